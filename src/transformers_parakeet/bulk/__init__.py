"""Transcription of archives: batches of columns for other engines, and folders of Parquet files with Ray Data."""

from .job import ENGINES, BulkJob, BulkOptions, BulkPlan, BulkTotals
from .ray_data import RayOptions, import_ray
from .transcriber import Transcriber
from .worker import ShardReport

__all__ = [
    "ENGINES",
    "BulkJob",
    "BulkOptions",
    "BulkPlan",
    "BulkTotals",
    "RayOptions",
    "ShardReport",
    "Transcriber",
    "import_ray",
]

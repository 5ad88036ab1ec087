"""Export to ONNX: folders that the package onnx-asr loads."""

from .comparison import count_different_clips
from .folder import export_onnx
from .requirements import get_onnx_asr_type

__all__ = ["count_different_clips", "export_onnx", "get_onnx_asr_type"]

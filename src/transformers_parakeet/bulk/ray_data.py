"""Runs shards on the workers of Ray Data: a pool of actors, each with a model, and CPU tasks that decode audio.

`job.py` plans the shards, and runs those again whose worker or machine ended.
"""

from __future__ import annotations

import copy
import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers.utils import logging as transformers_logging

from ..optional_packages import import_optional
from .shards import Shard
from .transcriber import format_error
from .worker import ShardReport, ShardWorker, decode_shard

logger = transformers_logging.get_logger(__name__)

LOCAL_HOST = "127.0.0.1"
# settings of Ray, which reads them when it is imported: no usage statistics
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
# and without clusters, as on Windows and macOS, Ray uses the loopback address, so that other machines cannot reach it
LOCAL_ENVIRONMENT = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
# CPUs of a worker without a GPU, unless its number is given
CPUS_PER_WORKER = 4


@dataclass(frozen=True)
class RayOptions:
    """How a job uses a Ray cluster.

    Args:
        address: address of a running cluster; `None` for the environment variable `RAY_ADDRESS`, or else for a new Ray
            on this machine that ends with the job.
        num_workers: number of models that run at a time; `None` for one per GPU, or without a GPU one per
            `cpus_per_worker` CPUs.
        cpus_per_worker: number of CPUs and threads of a worker; `None` for 1 with a GPU, and otherwise for an equal
            part of the CPUs, at most 4 unless `num_workers` is given.
        decodes_on_cpus: whether audio is decoded in CPU tasks while the workers compute; `None` for yes with GPUs.

    Raises:
        ValueError: a number is less than 1.
    """

    address: str | None = None
    num_workers: int | None = None
    cpus_per_worker: int | None = None
    decodes_on_cpus: bool | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in ("num_workers", "cpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}: raise it")


@dataclass(frozen=True)
class Pool:
    """The workers of a job.

    Args:
        num_workers: number of actors.
        num_cpus, num_gpus: CPUs and GPUs of an actor.
        decodes_on_cpus: whether audio is decoded in CPU tasks.
    """

    num_workers: int
    num_cpus: int
    num_gpus: int
    decodes_on_cpus: bool


def import_ray(is_local: bool = True) -> Any:
    """Import Ray without usage statistics; values of its environment variables that are set already are kept.

    Args:
        is_local: whether a Ray that this process starts can be reached from this machine only.

    Raises:
        ImportError: Ray is not installed.
    """
    for name, value in {**ENVIRONMENT, **(LOCAL_ENVIRONMENT if is_local else {})}.items():
        os.environ.setdefault(name, value)
    import_optional("ray.data", "the engine `ray`", "ray")
    return import_optional("ray", "the engine `ray`", "ray")


@contextmanager
def connect(options: RayOptions) -> Iterator[Any]:
    """Connect to a Ray cluster, or start Ray on this machine for the time of the `with` block.

    A Ray that this function starts has no dashboard, and its servers listen on 127.0.0.1 only. If the program is
    connected to Ray already, this connection is used.

    Args:
        options: address of the cluster, and number of workers.

    Yields:
        The module `ray`.

    Raises:
        ConnectionError: there is no cluster at the address.
        RuntimeError: Ray was imported before with other settings, so that its servers would listen on all addresses.
    """
    address = options.address or os.environ.get("RAY_ADDRESS")
    ray = import_ray(is_local=address is None)
    if ray.is_initialized():
        yield ray
        return
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        ray.init(address=address, **quiet)
    else:
        num_cpus = max(count_cpus(), options.num_workers or 1)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, _node_ip_address=LOCAL_HOST, **quiet)
    try:
        if address is None and ray.util.get_node_ip_address() != LOCAL_HOST:
            raise RuntimeError(
                f"Ray must listen on {LOCAL_HOST} only, but it was imported before its settings: call `import_ray` "
                "first, or set RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0"
            )
        yield ray
    finally:
        ray.shutdown()


def count_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_pool(nodes: Sequence[dict[str, float]], options: RayOptions) -> Pool:
    """Choose the workers for the machines of a cluster.

    Args:
        nodes: resources of each machine, such as `{"CPU": 8.0, "GPU": 1.0}`.
        options: the numbers that are given.

    Raises:
        ValueError: the cluster has too few CPUs.
    """
    num_cpus = int(sum(node.get("CPU", 0) for node in nodes))
    num_gpus = int(sum(node.get("GPU", 0) for node in nodes))
    decodes_on_cpus = num_gpus > 0 if options.decodes_on_cpus is None else options.decodes_on_cpus
    if num_gpus:
        if (options.num_workers or 0) > num_gpus:
            raise ValueError(
                f"each worker needs a GPU, got {options.num_workers} workers for {num_gpus} GPUs: use fewer"
            )
        return Pool(options.num_workers or num_gpus, options.cpus_per_worker or 1, 1, decodes_on_cpus)
    largest = int(max((node.get("CPU", 0) for node in nodes), default=0))
    usable = num_cpus - int(decodes_on_cpus)
    share = CPUS_PER_WORKER if options.num_workers is None else usable // options.num_workers
    cpus_per_worker = options.cpus_per_worker or max(1, min(share, largest, max(1, usable)))
    num_workers = options.num_workers or max(1, usable // cpus_per_worker)
    if num_workers * cpus_per_worker > usable or cpus_per_worker > largest:
        decoding = " and a CPU for decoding" if decodes_on_cpus else ""
        raise ValueError(
            f"{num_workers} workers with {cpus_per_worker} CPUs each{decoding} must fit the cluster, which has "
            f"{num_cpus} CPUs, at most {largest} in one machine: lower the number of workers or their CPUs"
        )
    return Pool(num_workers, cpus_per_worker, 0, decodes_on_cpus)


class _Actor:
    """A worker of the pool: calls a `ShardWorker` with the rows of Ray Data.

    Args:
        worker: the worker, pickled.
    """

    def __init__(self, worker: bytes) -> None:
        self.worker: ShardWorker = pickle.loads(worker)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Transcribe the shard in the only row, and return its report as a row."""
        shard: Shard = pickle.loads(batch["shard"][0])
        decoded = pickle.loads(batch["decoded"][0]) if "decoded" in batch else None
        report = self.worker.run(shard, decoded)
        return {name: [value] for name, value in asdict(report).items()}


def _decode_row(batch: dict[str, Any]) -> dict[str, list[Any]]:
    """Decode the shard in the only row, and return it with the samples."""
    decoded = decode_shard(pickle.loads(batch["shard"][0]))
    return {"shard": [batch["shard"][0]], "decoded": [pickle.dumps(decoded)]}


def run_shards(
    ray: Any, shards: Sequence[Shard], worker: ShardWorker, options: RayOptions, tasks_per_worker: int
) -> Iterator[ShardReport]:
    """Run shards once on the workers of a cluster.

    A shard whose worker process or machine ends is not run again, and has no report.

    Args:
        ray: the module, connected to a cluster.
        shards: the shards.
        worker: the worker.
        options: number and size of the workers.
        tasks_per_worker: number of shards that a worker may have, of which it transcribes one.

    Yields:
        A report for each shard that a worker finished, in the order in which they finish.

    Raises:
        ValueError: the cluster has too few CPUs.
    """
    pool = choose_pool([node["Resources"] for node in ray.nodes() if node["Alive"]], options)
    transcriber = copy.copy(worker.transcriber)
    transcriber.num_threads = pool.num_cpus
    # one row and one block per shard: a block is what Ray runs, and loses, at a time
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    with _configure(ray) as errors:
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if pool.decodes_on_cpus:
            dataset = dataset.map_batches(_decode_row, batch_size=1, num_cpus=1)
        dataset = dataset.map_batches(
            _Actor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=pool.num_workers, max_tasks_in_flight_per_actor=tasks_per_worker),
            fn_constructor_args=(pickle.dumps(ShardWorker(transcriber, worker.target)),),
            num_cpus=pool.num_cpus,
            num_gpus=pool.num_gpus,
            # A worker that ends is started again, but its shard is not sent to it again: if no machine has room for the
            # worker, Ray would wait for it until the end of the job.
            max_restarts=-1,
            max_task_retries=0,
        )
        for row in dataset.iter_rows():
            yield ShardReport(**row)
    if errors.last is not None:
        logger.warning("Ray lost a shard: %s", errors.last)


class _LastError(logging.Handler):
    """Stores the last error that is logged.

    Attributes:
        last: the error as one line; `None` if there was no error.
    """

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.last: str | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Store the error of a record.

        Args:
            record: the record.
        """
        error = record.exc_info[1] if record.exc_info else None
        self.last = record.getMessage() if error is None else format_error(error)


@contextmanager
def _configure(ray: Any) -> Iterator[_LastError]:
    """Set for the `with` block that Ray Data continues after a lost shard, and stores errors instead of printing."""
    context = ray.data.DataContext.get_current()
    changes = {"max_errored_blocks": -1, "enable_progress_bars": False, "print_on_execution_start": False}
    previous = {name: getattr(context, name) for name in changes}
    data_logger = logging.getLogger("ray.data")
    handlers, propagates = data_logger.handlers, data_logger.propagate
    errors = _LastError()
    for name, value in changes.items():
        setattr(context, name, value)
    data_logger.handlers, data_logger.propagate = [errors], False
    try:
        with warnings.catch_warnings():
            # the options of the actors
            warnings.filterwarnings("ignore", message=".*ray_remote_args")
            yield errors
    finally:
        data_logger.handlers, data_logger.propagate = handlers, propagates
        for name, value in previous.items():
            setattr(context, name, value)


__all__ = ["Pool", "RayOptions", "choose_pool", "connect", "import_ray", "run_shards"]

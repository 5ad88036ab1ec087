"""Finds a checkpoint on disk or on the Hub; `reader.py` loads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

logger = logging.get_logger(__name__)

# seconds to wait for the list of files from the Hub before the cache is used
HUB_TIMEOUT_S = 10.0

# A failed request raises OSError or the error class of the HTTP library, which is httpx or httpx2 depending on the
# release of huggingface_hub. `HfHubHTTPError` inherits from both classes.
REQUEST_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


# name of the bundled model on the command line and in `transcribe`
DEMO_MODEL = "demo"


def demo_model_path() -> Path:
    """Return the folder of the bundled demo model, which recognises spoken English digits."""
    return Path(__file__).parents[1] / "demo_model"


def resolve_model_name(model: str | Path) -> str | Path:
    """Return the folder of the demo model for the name `"demo"`, and every other name unchanged.

    Args:
        model: Hub id, path of a folder or `.nemo` file, or `"demo"`.
    """
    return demo_model_path() if model == DEMO_MODEL else model


def find_checkpoint(path: str | Path, **hub: Any) -> Path:
    """Locate a checkpoint, and download the `.nemo` file of a Hub repository if necessary.

    Args:
        path: path of a `.nemo` file, path of a folder, or Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        Path of a `.nemo` file. If there are safetensors instead: path of the folder, or the Hub id as a path. If the
        Hub cannot be reached, path of the cached folder.

    Raises:
        FileNotFoundError: the file does not exist, or the folder or repository contains no checkpoint.
        OSError: the Hub refuses the request or cannot be reached, and the cache does not contain the repository.
    """
    local_path = Path(path)
    if local_path.is_dir():
        names = sorted(file.name for file in local_path.iterdir())
        return choose_checkpoint(str(path), names, local_path, lambda name: local_path / name)
    if local_path.is_file():
        return local_path
    if isinstance(path, Path) or not is_repo_id(path):
        raise FileNotFoundError(
            f"the file {path} does not exist: give the path of a .nemo file or folder, or a Hub id such as "
            "nvidia/parakeet-tdt-0.6b-v3"
        )
    repository = HubFiles(path, **hub)
    return choose_checkpoint(path, repository.names, repository.snapshot_folder or Path(path), repository.fetch)


def download_checkpoint(path: str | Path, **hub: Any) -> Path:
    """Locate a checkpoint, and download it if it is on the Hub.

    Args:
        path: path of a `.nemo` file, path of a folder, or Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        Path of a `.nemo` file, or of a folder with safetensors.

    Raises:
        FileNotFoundError: the file does not exist, or the folder or repository contains no checkpoint.
        OSError: the Hub refuses the request or cannot be reached.
    """
    hub = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False, **hub}
    checkpoint = find_checkpoint(path, **hub)
    if checkpoint.exists():
        return checkpoint
    try:
        # files in sub-folders belong to other formats
        patterns = {"allow_patterns": ["*.json", "*.safetensors"], "ignore_patterns": ["*/*"]}
        return Path(snapshot_download(str(path), **hub, **patterns))
    except REQUEST_ERRORS as error:
        raise OSError(explain_failure(str(path), hub["revision"], error)) from error


def is_repo_id(path: str) -> bool:
    """Return whether a string has the form of a Hub id, `org/name`.

    Args:
        path: a path or a Hub id.
    """
    try:
        validate_repo_id(path)
    except ValueError:
        return False
    return path.count("/") == 1 and not path.endswith(".nemo")


def choose_checkpoint(source: str, names: list[str], folder: Path, fetch: Callable[[str], Path]) -> Path:
    """Choose the checkpoint of a folder or Hub repository: safetensors if available, otherwise the `.nemo` file.

    Args:
        source: path of the folder or Hub id, for messages.
        names: relative paths of all files in the folder or repository.
        folder: path to return if the folder or repository contains safetensors.
        fetch: `fetch(name)` returns the local path of a file, and downloads the file if necessary.

    Returns:
        `folder`, or the local path of the `.nemo` file. If there are several `.nemo` files, the one with the name of
        the folder or repository.

    Raises:
        FileNotFoundError: there is no checkpoint, or there are several `.nemo` files and none has that name.
    """
    # files in sub-folders belong to other formats
    root_files = [name for name in names if "/" not in name]
    nemo_files = [name for name in root_files if name.endswith(".nemo")]
    if "config.json" in root_files and any(name.endswith(".safetensors") for name in root_files):
        if nemo_files:
            logger.warning("%s contains safetensors, so %s is not loaded", source, ", ".join(nemo_files))
        else:
            logger.info("%s contains safetensors, which from_pretrained loads", source)
        return folder
    repository_name = source.rstrip("/").rpartition("/")[2]
    same_name_files = [name for name in nemo_files if name == f"{repository_name}.nemo"]
    if len(nemo_files) != 1 and len(same_name_files) != 1:
        raise FileNotFoundError(
            f"{source} must contain one .nemo file or safetensors, but it contains "
            f"{', '.join(nemo_files) or 'neither'}: give the path of the file"
        )
    return fetch((same_name_files or nemo_files)[0])


class HubFiles:
    """The files of a Hub repository, or of the local cache if the Hub cannot be reached.

    Args:
        repo_id: repository id on the Hub, `org/name`.
        local_files_only: whether to use only the cache, without a request to the Hub.
        token: access token, as in `from_pretrained`.
        revision: branch, tag or commit; None for the default branch.
        cache_dir: folder of the cache, as in `from_pretrained`.

    Raises:
        OSError: the Hub refuses the request or cannot be reached, and the cache does not contain the repository.
    """

    def __init__(
        self, repo_id: str, *, local_files_only: bool, token: Any, revision: str | None, cache_dir: Any
    ) -> None:
        self.repo_id, self.token, self.revision, self.cache_dir = repo_id, token, revision, cache_dir
        # folder of the repository in the cache; None if the Hub answered
        self.snapshot_folder: Path | None = None
        request_error: Exception | None = None
        if not local_files_only:
            try:
                # `model_info` sends one request; other functions of the library retry a failed request for 30 s
                info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=HUB_TIMEOUT_S)
            except REQUEST_ERRORS as error:
                request_error = error
                logger.info("the Hub does not respond (%s): using the cache for %s", summarize_error(error), repo_id)
            else:
                self.names = [file.rfilename for file in info.siblings or []]
                return
        self.snapshot_folder = self._find_cached_snapshot(request_error)
        self.names = sorted(
            file.relative_to(self.snapshot_folder).as_posix()
            for file in self.snapshot_folder.rglob("*")
            if file.is_file()
        )

    def _find_cached_snapshot(self, request_error: Exception | None) -> Path:
        """Find the folder of the repository in the cache.

        Args:
            request_error: exception raised by the request to the Hub; None if no request was sent.

        Raises:
            OSError: the cache does not contain the repository.
        """
        options = {"revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(snapshot_download(self.repo_id, local_files_only=True, **options))
        except LocalEntryNotFoundError as error:
            # newer releases of huggingface_hub raise this error for an incomplete folder and store the path in the
            # error; the folder may still contain the files of the checkpoint
            folder = getattr(error, "snapshot_path", None)
            if folder is not None:
                return Path(folder)
            message = explain_failure(self.repo_id, self.revision, request_error)
            raise OSError(message) from (request_error or error)

    def fetch(self, name: str) -> Path:
        """Return the local path of a file, and download the file if it is not in the cache.

        Args:
            name: path of the file in the repository.

        Raises:
            OSError: the download failed.
        """
        if self.snapshot_folder is not None:
            return self.snapshot_folder / name
        options = {"token": self.token, "revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(hf_hub_download(self.repo_id, name, **options))
        except REQUEST_ERRORS as error:
            raise OSError(explain_failure(self.repo_id, self.revision, error)) from error


def explain_failure(repo_id: str, revision: str | None, error: Exception | None) -> str:
    """Build a one-line message that explains why a Hub repository cannot be read and how to fix the problem.

    Args:
        repo_id: repository id on the Hub, `org/name`.
        revision: requested branch, tag or commit; None for the default branch.
        error: exception raised by the request; None if no request was sent (offline mode).
    """
    if error is None:
        return (
            f"the cache does not contain {repo_id}: load it once with `local_files_only=False`, or give the path of a "
            "file or folder"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo_id} is a gated repository: accept the terms of use on its page on the Hub, and log in with "
            "`hf auth login` or pass `token`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo_id} is neither a local file or folder nor a Hub repository that you can access: correct the name, "
            "or log in with `hf auth login` if the repository is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision!r}: give an existing branch, tag or commit"
    return (
        f"the Hub cannot be reached ({summarize_error(error)}), and the cache does not contain {repo_id}: check the "
        "connection, or give the path of a file or folder"
    )


def summarize_error(error: Exception) -> str:
    """Format an error as the name of its class and the first line of its message.

    Args:
        error: any exception.
    """
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__

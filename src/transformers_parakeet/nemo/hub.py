"""Finds a checkpoint by path, folder or Hub id; the checkpoint is loaded by `reader.py`."""

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

# seconds to wait for the Hub's list of files before the cache is used
HUB_TIMEOUT_S = 10.0

# a failed request raises OSError or the error class of the HTTP library, which is httpx or httpx2 depending on the
# release of huggingface_hub; both are base classes of the Hub's own error
REQUEST_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)


def find_checkpoint(path: str | Path, **hub: Any) -> Path:
    """Find the checkpoint of a path, a folder or a Hub id, and download its `.nemo` file if needed.

    Args:
        path: a `.nemo` file, a folder, or a Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        A `.nemo` file; or a folder, or the Hub id as a path, if it contains safetensors.

    Raises:
        FileNotFoundError: there is no such file, or the folder or repository contains no checkpoint.
        OSError: the Hub refuses the request or cannot be reached, and the cache does not contain the repository.
    """
    local_path = Path(path)
    if local_path.is_dir():
        names = sorted(file.name for file in local_path.iterdir())
        return choose_checkpoint(str(path), names, local_path, lambda name: local_path / name)
    if local_path.is_file():
        return local_path
    if isinstance(path, Path) or not is_repo_id(path):
        raise FileNotFoundError(f"the file {path} does not exist")
    files = HubFiles(path, **hub)
    return choose_checkpoint(path, files.names, files.cache_folder or Path(path), files.fetch)


def is_repo_id(path: str) -> bool:
    """Return whether a text has the form `org/name` of a Hub id."""
    try:
        validate_repo_id(path)
    except ValueError:
        return False
    return path.count("/") == 1 and not path.endswith(".nemo")


def choose_checkpoint(source: str, names: list[str], folder: Path, fetch: Callable[[str], Path]) -> Path:
    """Choose between the safetensors of a folder or repository and its `.nemo` file; safetensors are preferred.

    Args:
        source: the folder or Hub id, for messages.
        names: paths of the files in it, relative to it.
        folder: the result if there are safetensors.
        fetch: `fetch(name)` returns the local path of a file.

    Returns:
        `folder`, or the local path of the `.nemo` file. Of several, it is the one with the name of the repository.

    Raises:
        FileNotFoundError: there is no checkpoint, or the choice between several `.nemo` files is not clear.
    """
    # files in sub-folders belong to other formats
    names = [name for name in names if "/" not in name]
    nemo_files = [name for name in names if name.endswith(".nemo")]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        if nemo_files:
            logger.warning("%s contains safetensors: they are loaded, not %s", source, ", ".join(nemo_files))
        else:
            logger.info("%s contains safetensors: they are loaded by from_pretrained", source)
        return folder
    repository_name = source.rstrip("/").rpartition("/")[2]
    preferred = [name for name in nemo_files if name == f"{repository_name}.nemo"]
    if len(nemo_files) != 1 and len(preferred) != 1:
        raise FileNotFoundError(
            f"{source} must contain one .nemo file or safetensors, it contains {', '.join(nemo_files) or 'neither'}: "
            "give the path of the file"
        )
    return fetch((preferred or nemo_files)[0])


class HubFiles:
    """The files of a Hub repository, or of its copy in the cache if the Hub cannot be reached.

    Args:
        repo: the Hub id.
        local_files_only: do not access the Hub.
        token: as in `from_pretrained`.
        revision: branch, tag or commit; None for the default branch.
        cache_dir: as in `from_pretrained`.

    Raises:
        OSError: the Hub refuses the request or cannot be reached, and the cache does not contain the repository.
    """

    def __init__(self, repo: str, *, local_files_only: bool, token: Any, revision: str | None, cache_dir: Any) -> None:
        self.repo, self.token, self.revision, self.cache_dir = repo, token, revision, cache_dir
        # folder of the repository in the cache; None if the Hub has answered
        self.cache_folder: Path | None = None
        request_error: Exception | None = None
        if not local_files_only:
            try:
                # a single request: other functions of the library repeat a failed request for half a minute
                info = HfApi(token=token).model_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
            except REQUEST_ERRORS as error:
                request_error = error
                logger.info("the Hub does not answer (%s): using the cache for %s", first_line(error), repo)
            else:
                self.names = [file.rfilename for file in info.siblings or []]
                return
        self.cache_folder = self._find_cache_folder(request_error)
        self.names = sorted(
            file.relative_to(self.cache_folder).as_posix() for file in self.cache_folder.rglob("*") if file.is_file()
        )

    def _find_cache_folder(self, request_error: Exception | None) -> Path:
        """Return the folder of the repository in the cache.

        Args:
            request_error: why the Hub did not answer; None if it was not asked.

        Raises:
            OSError: the cache does not contain the repository.
        """
        options = {"revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(snapshot_download(self.repo, local_files_only=True, **options))
        except LocalEntryNotFoundError as error:
            # newer releases of the library refuse an incomplete folder, which may still have the files of the model
            folder = getattr(error, "snapshot_path", None)
            if folder is not None:
                return Path(folder)
            message = explain_failure(self.repo, self.revision, request_error)
            raise OSError(message) from (request_error or error)

    def fetch(self, name: str) -> Path:
        """Return the local path of a file, and download it if it is not in the cache.

        Args:
            name: path of the file in the repository.

        Raises:
            OSError: the download failed.
        """
        if self.cache_folder is not None:
            return self.cache_folder / name
        options = {"token": self.token, "revision": self.revision, "cache_dir": self.cache_dir}
        try:
            return Path(hf_hub_download(self.repo, name, **options))
        except REQUEST_ERRORS as error:
            raise OSError(explain_failure(self.repo, self.revision, error)) from error


def explain_failure(repo: str, revision: str | None, error: Exception | None) -> str:
    """Return one line that says why a repository cannot be read, and what to do.

    Args:
        repo: the Hub id.
        revision: the requested branch, tag or commit; None for the default branch.
        error: the error of the request; None if the Hub was not asked.
    """
    if error is None:
        return (
            f"the cache does not contain {repo}: load it once with `local_files_only=False`, or give the path of a "
            "file or folder"
        )
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is available only to users who accept its terms: accept them on its page on the Hub, and log in "
            "with `hf auth login` or pass `token`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{repo} is not a local file or folder, and the Hub has no repository of that name that you may read: "
            "correct the name, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: give one of its branches, tags or commits"
    return (
        f"the Hub cannot be reached ({first_line(error)}), and the cache does not contain {repo}: check the "
        "connection, or give the path of a file or folder"
    )


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message."""
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__

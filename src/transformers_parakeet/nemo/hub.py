"""Finds a checkpoint by path, folder or Hub id, and loads one that is in the format of transformers.

What a `.nemo` file holds is for `nemo.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.utils import logging

from ..configuration_parakeet import kind_of
from ..modeling_parakeet import ParakeetForCTC, ParakeetForRNNT, ParakeetForTDT, ParakeetPreTrainedModel
from ..processing_parakeet import ParakeetProcessor
from .archive import NemoError

logger = logging.get_logger(__name__)

# seconds to wait for the Hub's list of files before the cache is used
HUB_TIMEOUT_S = 10.0

# what a failed request raises: OSError, or the error class of the HTTP library, which is httpx up to huggingface_hub 1
# and httpx2 after it; both are base classes of the Hub's own error
REQUEST_ERRORS: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)

# kind of head -> its model; `config_class` of a model is its configuration
MODELS: dict[str, type[ParakeetPreTrainedModel]] = {
    "ctc": ParakeetForCTC,
    "rnnt": ParakeetForRNNT,
    "tdt": ParakeetForTDT,
}


def find_checkpoint(path: str | Path, **hub: Any) -> Path:
    """Return the `.nemo` file of a path, a folder or a Hub id; or a folder or id that holds safetensors.

    Args:
        path: as in `load_nemo`.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        FileNotFoundError: there is no such file, or the folder or repository holds no checkpoint.
        OSError: the Hub refuses or cannot be reached, and the cache does not hold the repository.
    """
    local = Path(path)
    if local.is_dir():
        return choose(str(path), sorted(file.name for file in local.iterdir()), local, lambda name: local / name)
    if local.is_file():
        return local
    if isinstance(path, Path) or not is_repo_id(path):
        raise FileNotFoundError(f"there is no file {path}")
    files = HfFiles(path, **hub)
    return choose(path, files.names, files.folder or Path(path), files.fetch)


def is_repo_id(path: str) -> bool:
    """Tell whether a text has the form `org/name`."""
    try:
        validate_repo_id(path)
    except ValueError:
        return False
    return path.count("/") == 1 and not path.endswith(".nemo")


def choose(source: str, names: list[str], folder: Path, fetch: Callable[[str], Path]) -> Path:
    """Choose between the safetensors of a folder or repository and its `.nemo` file.

    Args:
        source: the folder or Hub id, named in errors.
        names: paths of its files, relative to it.
        folder: returned when there are safetensors.
        fetch: returns the path of a file.
    """
    # files in sub-folders belong to other formats
    names = [name for name in names if "/" not in name]
    archives = [name for name in names if name.endswith(".nemo")]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        if archives:
            logger.warning("%s holds safetensors: they are loaded, not %s", source, ", ".join(archives))
        else:
            logger.info("%s holds safetensors: they are loaded by from_pretrained", source)
        return folder
    own = [name for name in archives if name == f"{source.rstrip('/').rpartition('/')[2]}.nemo"]
    if len(archives) != 1 and len(own) != 1:
        raise FileNotFoundError(
            f"{source} must hold one .nemo file or safetensors, it holds {', '.join(archives) or 'neither'}: "
            "name the file"
        )
    return fetch((own or archives)[0])


class HfFiles:
    """The files of a Hub repository, from the Hub or, where it cannot be reached, from the cache.

    Args:
        repo: the Hub id.
        local_files_only: do not ask the Hub.
        token: as in `from_pretrained`.
        **place: `revision`, `cache_dir`.

    Raises:
        OSError: the Hub refuses or cannot be reached, and the cache does not hold the repository.
    """

    def __init__(self, repo: str, *, local_files_only: bool, token: Any, **place: Any) -> None:
        self.repo, self.place, self.token = repo, place, token
        # folder of the cache, when the files come from there
        self.folder: Path | None = None
        refusal: Exception | None = None
        if not local_files_only:
            try:
                # one request: other calls of the library repeat a failed one for half a minute
                info = HfApi(token=token).model_info(repo, revision=place["revision"], timeout=HUB_TIMEOUT_S)
            except REQUEST_ERRORS as error:
                refusal = error
                logger.info("the Hub does not answer (%s): looking for %s in the cache", first_line(error), repo)
            else:
                self.names = [file.rfilename for file in info.siblings or []]
                return
        self.folder = self._cached(refusal)
        self.names = sorted(
            file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file()
        )

    def _cached(self, refusal: Exception | None) -> Path:
        """Return the folder of the cache; raise where there is none."""
        try:
            return Path(snapshot_download(self.repo, local_files_only=True, **self.place))
        except LocalEntryNotFoundError as error:
            # newer releases of the library refuse a folder that lacks files; those that a model needs may be there
            folder = getattr(error, "snapshot_path", None)
            if folder is not None:
                return Path(folder)
            raise OSError(explain(self.repo, self.place["revision"], refusal)) from (refusal or error)

    def fetch(self, name: str) -> Path:
        """Return the path of a file, after a download where it is not in the cache."""
        if self.folder is not None:
            return self.folder / name
        try:
            return Path(hf_hub_download(self.repo, name, token=self.token, **self.place))
        except REQUEST_ERRORS as error:
            raise OSError(explain(self.repo, self.place["revision"], error)) from error


def explain(repo: str, revision: str | None, error: Exception | None) -> str:
    """Say in one line why a repository cannot be read, and what to do.

    Args:
        repo: the Hub id.
        revision: that was asked for.
        error: what the request raised; `None` when the Hub was not to be asked.
    """
    if error is None:
        return f"the cache does not hold {repo}: load it once with `local_files_only=False`, or name a file or folder"
    if isinstance(error, GatedRepoError):
        return (
            f"{repo} is open only to those who accept its terms: accept them on its page on the Hub, and log in with "
            "`hf auth login` or pass `token`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no file or folder {repo} here, and no repository of that name on the Hub that you may read: "
            "correct the name, or log in with `hf auth login` if it is private"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: name a branch, tag or commit of it"
    return (
        f"the Hub cannot be reached ({first_line(error)}), and the cache does not hold {repo}: check the connection, "
        "or name a file or folder"
    )


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its text."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}".removesuffix(": ")


def load_folder(
    source: str | Path, *, dtype: torch.dtype | None = None, **hub: Any
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load a folder or Hub repository in the format of transformers.

    Args:
        source: the folder or id.
        dtype: of the weights; default as in the file.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        NemoError: it holds no Parakeet model.
    """
    source = Path(source).as_posix()
    config = AutoConfig.from_pretrained(source, **hub)
    kind = kind_of(config)
    if kind not in MODELS:
        raise NemoError(
            f"{source} holds a model of type {config.model_type!r}, it must be a Parakeet model with a head"
        )
    model: ParakeetPreTrainedModel = MODELS[kind].from_pretrained(source, config=config, dtype=dtype or "auto", **hub)
    return model.eval(), ParakeetProcessor.from_pretrained(source, **hub)

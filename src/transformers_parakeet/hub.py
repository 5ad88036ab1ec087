"""Finds a checkpoint by path, folder or Hub id, and loads one that is in the format of transformers.

What a `.nemo` file holds is for `nemo.py`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig
from transformers.utils import logging

from .archive import NemoError
from .configuration_parakeet import kind_of
from .modeling_parakeet import ParakeetForCTC, ParakeetForRNNT, ParakeetForTDT, ParakeetPreTrainedModel
from .processing_parakeet import ParakeetProcessor

logger = logging.get_logger(__name__)

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
    """
    local = Path(path)
    if local.is_dir():
        return choose(str(path), sorted(file.name for file in local.iterdir()), lambda name: local / name)
    if local.is_file():
        return local
    if isinstance(path, Path) or not is_repo_id(path):
        raise FileNotFoundError(f"there is no file {path}")
    files = HfFiles(path, **hub)
    return choose(path, files.names, files.fetch)


def is_repo_id(path: str) -> bool:
    """Tell whether a text has the form `org/name`."""
    try:
        validate_repo_id(path)
    except ValueError:
        return False
    return path.count("/") == 1 and not path.endswith(".nemo")


def choose(source: str, names: list[str], fetch: Callable[[str], Path]) -> Path:
    """Choose between safetensors and a `.nemo` file."""
    archives = [name for name in names if name.endswith(".nemo")]
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        if archives:
            logger.warning("%s holds safetensors: they are loaded, not %s", source, ", ".join(archives))
        else:
            logger.info("%s holds safetensors: they are loaded by from_pretrained", source)
        return Path(source)
    own = [name for name in archives if name == f"{source.rstrip('/').rpartition('/')[2]}.nemo"]
    if len(archives) != 1 and len(own) != 1:
        raise FileNotFoundError(
            f"{source} must hold one .nemo file or safetensors, it holds {', '.join(archives) or 'neither'}: "
            "name the file"
        )
    return fetch((own or archives)[0])


class HfFiles:
    """The files of a Hub repository, from the Hub or, without it, from the cache."""

    def __init__(self, repo: str, *, local_files_only: bool, token: Any, **place: Any) -> None:
        self.repo, self.place, self.token = repo, place, token
        self.local = local_files_only
        try:
            if not self.local:
                self.names = HfApi(token=token).list_repo_files(repo, revision=place["revision"])
                return
        except (OfflineModeIsEnabled, ConnectionError) as error:
            logger.info("the Hub is not reached (%s): looking for %s in the cache", error, repo)
            self.local = True
        self.folder = Path(snapshot_download(repo, local_files_only=True, **place))
        self.names = sorted(str(file.relative_to(self.folder)) for file in self.folder.rglob("*") if file.is_file())

    def fetch(self, name: str) -> Path:
        """Return the path of a file, after a download where it is not in the cache."""
        if self.local:
            return self.folder / name
        return Path(hf_hub_download(self.repo, name, token=self.token, **self.place))


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
    config = AutoConfig.from_pretrained(source, **hub)
    kind = kind_of(config)
    if kind not in MODELS:
        raise NemoError(
            f"{source} holds a model of type {config.model_type!r}, it must be a Parakeet model with a head"
        )
    model: ParakeetPreTrainedModel = MODELS[kind].from_pretrained(source, config=config, dtype=dtype or "auto", **hub)
    return model.eval(), ParakeetProcessor.from_pretrained(source, **hub)

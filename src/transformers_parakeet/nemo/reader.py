"""Loads checkpoints: `.nemo` files without NeMo, and folders in the format of transformers.

`hub.py` finds the files, `archive.py` opens them, `fields.py` and `keys.py` define the settings, `weights.py` the names
of weights, and `sentencepiece.py` converts tokenizers. `writer.py` writes `.nemo` files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from ..configuration_parakeet import get_head_type
from ..feature_extraction_parakeet import ParakeetFeatureExtractor
from ..modeling_parakeet import ParakeetForCTC, ParakeetForRNNT, ParakeetForTDT, ParakeetPreTrainedModel
from ..processing_parakeet import ParakeetProcessor
from ..tokenization_parakeet import ParakeetTokenizer
from .archive import SETTINGS, Archive, NemoError
from .fields import VOCABULARY_LISTS, read_config_fields, read_extractor_fields
from .hub import find_checkpoint
from .keys import SECTIONS, check_section, check_settings, check_vocabulary, find_kind, has_ctc_head
from .sentencepiece import build_tokenizer, remove_duplicate_marks
from .settings import Settings, dump_settings, parse_settings, resolve_interpolations
from .weights import FEATURE_BUFFER_KEYS, fill_missing_sizes, from_nemo_name

logger = logging.get_logger(__name__)

# kind of head -> its model, whose `config_class` is its configuration
MODELS: dict[str, type[ParakeetPreTrainedModel]] = {
    "ctc": ParakeetForCTC,
    "rnnt": ParakeetForRNNT,
    "tdt": ParakeetForTDT,
}

# replaces a list of the tokenizer's pieces in `config.nemo_config`
PIECES = "<the pieces of the tokenizer>"


def load_nemo(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor of a `.nemo` file without NeMo.

    Weights are private views of the mapped file: they are read when they are first used, and processes that load the
    same file share the memory. A gzip archive is uncompressed into memory.

    Args:
        path: a `.nemo` file (plain or gzip tar), or a folder or Hub id `org/name` with such a file. A folder or
            repository with safetensors is loaded by `from_pretrained` instead.
        dtype: type of the weights; None for the type in the file.
        revision: branch, tag or commit of a Hub repository; None for the default branch.
        token: as in `from_pretrained`.
        cache_dir: as in `from_pretrained`.
        local_files_only: do not access the Hub, use the cache only.

    Returns:
        The model in evaluation mode (`ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; a hybrid is one of the
        last two with a CTC head), and its processor.

    Raises:
        FileNotFoundError: the file does not exist.
        NemoError: the file is damaged, or has a setting or a weight that is not implemented.
        OSError: the Hub refuses the request or cannot be reached.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    checkpoint = find_checkpoint(path, **hub)
    if not checkpoint.is_file():
        return load_folder(checkpoint, dtype=dtype, **hub)
    return load_archive(Archive(checkpoint), dtype)


def load_folder(
    source: str | Path, *, dtype: torch.dtype | None = None, **hub: Any
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor of a folder or Hub repository in the format of transformers.

    Args:
        source: the folder or Hub id.
        dtype: type of the weights; None for the type in the files.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        NemoError: the folder does not contain a Parakeet model with a head.
    """
    source = Path(source).as_posix()
    config = AutoConfig.from_pretrained(source, **hub)
    kind = get_head_type(config)
    if kind not in MODELS:
        raise NemoError(f"{source} must contain a Parakeet model with a head, its model type is {config.model_type!r}")
    model: ParakeetPreTrainedModel = MODELS[kind].from_pretrained(source, config=config, dtype=dtype or "auto", **hub)
    return model.eval(), ParakeetProcessor.from_pretrained(source, **hub)


def load_archive(
    archive: Archive, dtype: torch.dtype | None = None
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor of an open `.nemo` file, and raise every error with the name of the file.

    Args:
        archive: the file.
        dtype: type of the weights; None for the type in the file.

    Returns:
        The model in evaluation mode, and its processor.

    Raises:
        NemoError: the file is damaged, or has a setting or a weight that is not implemented.
    """
    path = archive.path
    try:
        return build_from_archive(archive, dtype)
    except KeyError as error:
        raise NemoError(f"{SETTINGS} of {path} lacks the setting {error}") from error
    except NemoError as error:
        raise NemoError(f"{error} (in {path})" if path.name not in str(error) else str(error)) from error
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise NemoError(f"a setting in {SETTINGS} of {path} has an invalid value: {error}") from error


def build_from_archive(
    archive: Archive, dtype: torch.dtype | None
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Build the model and the processor of an open `.nemo` file.

    Args:
        archive: the file.
        dtype: type of the weights; None for the type in the file.

    Raises:
        NemoError: the file is damaged, or has a setting or a weight that is not implemented.
        KeyError: a setting without default is missing; like other errors, it is translated by `load_archive`.
    """
    raw_settings = parse_settings(archive.read(SETTINGS))
    nemo_weights = archive.read_weights()
    settings = resolve_interpolations(raw_settings)
    kind = find_kind(settings)
    hybrid = kind != "ctc" and has_ctc_head(settings, nemo_weights)
    unknown = check_settings(settings, is_transducer=kind != "ctc", has_ctc_head=hybrid)
    if unknown:
        logger.warning(
            "%s has unknown settings. They cannot change the result of inference and are ignored: %s",
            archive.path,
            ", ".join(unknown),
        )
    settings = fill_missing_sizes(settings, {name: tensor.shape for name, tensor in nemo_weights.items()})
    tokenizer = read_tokenizer(settings, archive.read_artifact, kind)
    check_vocabulary(settings, len(tokenizer) - 1)
    config = build_config(settings, raw_settings, tokenizer, kind, hybrid)
    try:
        with torch.device("meta"):
            model = MODELS[kind](config)
    except RuntimeError as error:
        raise NemoError(f"a size in {SETTINGS} is too large for any model: {error}") from error
    load_weights(model, nemo_weights, archive, dtype)
    # after the weights: `preprocessor.features` is then known to have the size of a weight
    extractor = ParakeetFeatureExtractor(**read_extractor_fields(settings))
    return model.eval(), ParakeetProcessor(extractor, tokenizer, decoder_type=kind)


def build_config(
    settings: Settings, raw_settings: Settings, tokenizer: ParakeetTokenizer, kind: str, hybrid: bool
) -> Any:
    """Build the configuration of a model from the settings of its `.nemo` file.

    Args:
        settings: the resolved and checked settings, with the sizes of the weights.
        raw_settings: the settings before interpolations are resolved, which an export writes back.
        tokenizer: the tokenizer, whose last token is the blank.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
        hybrid: the model is a transducer with a CTC head.

    Raises:
        NemoError: a value is not implemented.
        KeyError: a setting that has no default is missing.
    """
    labels = len(tokenizer) - 1
    return MODELS[kind].config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        nemo_config=dump_without_pieces(raw_settings, tokenizer.convert_ids_to_tokens(range(labels))),
        **({} if kind == "ctc" else {"blank_token_id": labels, "forced_blanks": True}),
        **read_config_fields(settings, kind, hybrid),
    )


def read_tokenizer(settings: Settings, read_artifact: Callable[[str], bytes], kind: str) -> ParakeetTokenizer:
    """Build the tokenizer from the SentencePiece model in a `.nemo` file, or from one model per language.

    Args:
        settings: the resolved settings.
        read_artifact: `read_artifact(reference)` returns the file that a setting names.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.

    Raises:
        NemoError: a setting is not implemented, or a model is missing or damaged.
        KeyError: the section `tokenizer` is incomplete.
    """
    section = settings["tokenizer"]
    language_sections = [section]
    if section["type"].lower() == "agg":
        languages = section.get("langs") or {}
        for language, language_section in languages.items():
            check_section(language_section, f"tokenizer.langs.{language}", SECTIONS["tokenizer"])
        language_sections = list(languages.values())
    if not language_sections:
        raise NemoError("`tokenizer.langs` must have at least one language, it has none: save the file again")
    models = [read_artifact(language_section["model_path"]) for language_section in language_sections]
    return build_tokenizer(models, kind)


def dump_without_pieces(raw_settings: Settings, pieces: list[str]) -> str:
    """Return the settings as YAML for `config.nemo_config`, without the lists that repeat the tokenizer's pieces.

    The configuration stores text, because JSON would sort the keys.

    Args:
        raw_settings: the settings before interpolations are resolved.
        pieces: the tokens before the blank, in the order of their ids.
    """
    nemo_pieces = remove_duplicate_marks(pieces)

    def replace_pieces(value: Any, path: str) -> Any:
        """Return a part of the settings, given its dotted path, with `PIECES` in place of the lists."""
        if isinstance(value, dict):
            return {key: replace_pieces(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        return PIECES if path in VOCABULARY_LISTS and value == nemo_pieces else value

    return dump_settings(replace_pieces(raw_settings, "")).decode()


def load_weights(
    model: ParakeetPreTrainedModel,
    nemo_weights: Mapping[str, Tensor],
    archive: Archive,
    dtype: torch.dtype | None = None,
) -> None:
    """Put the weights of a `.nemo` file into a model; every weight must have a parameter, and every parameter a weight.

    Args:
        model: a model on the meta device; changed in place.
        nemo_weights: the weights under NeMo's names, views of the mapped file.
        archive: the file; the memory of each weight is released after it is checked, and read again when it is used.
        dtype: type of the weights; None for the type in the file.

    Raises:
        NemoError: names, shapes or types do not match, or a weight is not finite.
    """
    weights = {from_nemo_name(key): tensor for key, tensor in nemo_weights.items() if key not in FEATURE_BUFFER_KEYS}
    parameters = model.state_dict()
    check_names_and_shapes(weights, parameters)
    addresses: set[int] = set()
    for name, tensor in weights.items():
        if tensor.is_floating_point() != parameters[name].is_floating_point():
            raise NemoError(f"{name!r} is {tensor.dtype}: quantised weights are not implemented, save them in float32")
        check_finite(name, tensor)
        # NeMo stores tied weights once; here each parameter needs its own memory
        is_tied = tensor.data_ptr() in addresses
        addresses.add(tensor.data_ptr())
        target_dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.to(target_dtype, copy=is_tied)
        archive.release_memory(tensor)
    model.load_state_dict(weights, assign=True)
    compute_buffers(model)
    if dtype is not None:
        model.config.dtype = dtype


def check_names_and_shapes(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Refuse weights whose names or shapes differ from those of the model's state dict.

    Args:
        weights: the weights of the file under our names.
        parameters: state dict of the model.
    """
    missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unexpected:
        raise NemoError(f"the weights do not match the settings: missing {missing[:5]}, unexpected {unexpected[:5]}")
    differences = [
        f"{name}: {list(weights[name].shape)}, not {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if weights[name].shape != parameter.shape
    ]
    if differences:
        raise NemoError(f"the weights do not match the settings: {'; '.join(differences[:5])}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse a weight that contains NaN or infinity; both appear in its minimum or maximum."""
    if tensor.is_floating_point() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
        raise NemoError(f"the weight {name!r} contains NaN or infinity: the file is damaged, copy or save it again")


def compute_buffers(model: ParakeetPreTrainedModel) -> None:
    """Compute the buffers that are still on the meta device, because no checkpoint contains them."""
    for module in model.modules():
        meta_names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta_names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if meta_names:
            model._init_weights(module)


__all__ = ["NemoError", "load_nemo"]

"""Loads models and processors from `.nemo` files, without NeMo, and from transformers checkpoint folders.

`hub.py` finds the files, `archive.py` opens them, `fields.py` and `keys.py` interpret the settings, `weights.py`
translates the names of weights, and `sentencepiece.py` converts tokenizers. `writer.py` writes `.nemo` files.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from ..quantization_parakeet import ParakeetInt8Config, check_quantization, has_int8_weights, quantize_model
from ..tokenization_parakeet import ParakeetTokenizer
from .archive import SETTINGS_FILE, Archive, NemoError
from .fields import VOCABULARY_LISTS, read_config_fields, read_extractor_fields
from .hub import find_checkpoint
from .keys import SECTIONS, check_section, check_settings, check_vocabulary, detect_head_type, has_ctc_head
from .sentencepiece import build_tokenizer, strip_duplicate_suffixes
from .settings import Settings, dump_settings, parse_settings, resolve_interpolations
from .weights import FEATURE_BUFFER_KEYS, convert_nemo_name, convert_weights, fill_missing_sizes

logger = logging.get_logger(__name__)

# type of head -> model class; `config_class` of the model class is the configuration class
MODEL_CLASS_BY_HEAD_TYPE: dict[str, type[ParakeetPreTrainedModel]] = {
    "ctc": ParakeetForCTC,
    "rnnt": ParakeetForRNNT,
    "tdt": ParakeetForTDT,
}

# type of head -> its name in texts for readers
HEAD_NAMES = {"ctc": "CTC", "rnnt": "RNN-T", "tdt": "TDT"}

# text in `config.nemo_config` that replaces a list of all SentencePiece pieces
PIECES_PLACEHOLDER = "<the pieces of the tokenizer>"


@dataclass(frozen=True)
class ArchiveContents:
    """The checked contents of a `.nemo` file, from which the model is built.

    Args:
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        settings: settings with interpolations resolved and missing sizes filled in.
        weights: weights with NeMo's names, views of the memory-mapped file.
        tokenizer: tokenizer whose last token is the blank.
        config: configuration of the model.
    """

    head_type: str
    settings: Settings
    weights: Mapping[str, Tensor]
    tokenizer: ParakeetTokenizer
    config: Any


def load_nemo(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor from a `.nemo` file, without NeMo.

    The weights are copy-on-write views of the memory-mapped file. The system reads them on first use, and processes
    that load the same file share the memory. A gzip archive is decompressed into memory.

    Args:
        path: path of a `.nemo` file (plain or gzip tar), or a folder or Hub id `org/name` that contains a `.nemo` file.
            A folder or repository that contains safetensors is loaded by `from_pretrained` instead.
        dtype: dtype of the weights; None to keep the dtype in the file.
        quantize: `"int8"` for int8 weights and activations in the encoder blocks, and in decoding in the LSTM of the
            prediction network, for inference on a CPU with VNNI or AMX instructions; on another CPU, the model keeps
            its dtype, and a warning is logged. None for no quantisation.
        revision: branch, tag or commit of the Hub repository; None for the default branch.
        token: access token for the Hub, as in `from_pretrained`.
        cache_dir: folder of the Hub cache, as in `from_pretrained`.
        local_files_only: whether to use only the cache, without a request to the Hub.

    Returns:
        The model in eval mode and its processor. The model is a `ParakeetForCTC`, `ParakeetForRNNT` or
        `ParakeetForTDT`; a hybrid is a `ParakeetForRNNT` or `ParakeetForTDT` with a CTC head.

    Raises:
        FileNotFoundError: the file does not exist.
        NemoError: the file is damaged, or contains an unsupported setting or weight.
        OSError: the Hub refuses the request or cannot be reached.
        ValueError: `quantize` is unknown.
    """
    check_quantization(quantize)
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    checkpoint = find_checkpoint(path, **hub)
    if not checkpoint.is_file():
        return load_folder(checkpoint, dtype=dtype, quantize=quantize, **hub)
    model, processor = load_archive(Archive(checkpoint), dtype)
    if quantize is not None:
        quantize_model(model)
    return model, processor


def load_config(path: str | Path, **hub: Any) -> Any:
    """Load the configuration of a checkpoint without its weights.

    Of a `.nemo` file, the settings and the tokenizer are read, and of the weights only names, shapes and dtypes.

    Args:
        path: path of a `.nemo` file or folder, or Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        The configuration of the model; `dtype` is that of the weights in the checkpoint.

    Raises:
        FileNotFoundError: the file does not exist.
        NemoError: the file is damaged, contains an unsupported setting, or is not a Parakeet model with a head.
        OSError: the Hub refuses the request or cannot be reached.
    """
    hub = {"revision": None, "token": None, "cache_dir": None, "local_files_only": False, **hub}
    checkpoint = find_checkpoint(path, **hub)
    if not checkpoint.is_file():
        return load_folder_config(checkpoint, **hub)
    archive = Archive(checkpoint)
    with name_archive_in_errors(archive.path):
        contents = read_contents(archive)
    float_dtypes = {tensor.dtype for tensor in contents.weights.values() if tensor.is_floating_point()}
    # if a file contains several dtypes, the widest one is that of the numbers that the model computes
    contents.config.dtype = max(float_dtypes, key=lambda dtype: dtype.itemsize)
    return contents.config


def load_folder_config(source: str | Path, **hub: Any) -> Any:
    """Load the configuration of a transformers checkpoint folder or Hub repository.

    Args:
        source: path of the folder, or Hub id `org/name`.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Raises:
        NemoError: the checkpoint is not a Parakeet model with a CTC, RNN-T or TDT head.
    """
    config = AutoConfig.from_pretrained(Path(source).as_posix(), **hub)
    if get_head_type(config) not in MODEL_CLASS_BY_HEAD_TYPE:
        raise NemoError(
            f"{source} must contain a Parakeet model with a head, but the model type is {config.model_type!r}"
        )
    return config


def load_folder(
    source: str | Path, *, dtype: torch.dtype | None = None, quantize: str | None = None, **hub: Any
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor from a transformers checkpoint folder or Hub repository.

    Args:
        source: path of the folder, or Hub id `org/name`.
        dtype: dtype of the weights; None to keep the dtype in the files.
        quantize: `"int8"` to quantise float weights, as in `load_nemo`. Folders with int8 weights do not need it.
        **hub: `revision`, `token`, `cache_dir` and `local_files_only`, as in `load_nemo`.

    Returns:
        The model in eval mode and its processor.

    Raises:
        NemoError: the checkpoint is not a Parakeet model with a CTC, RNN-T or TDT head.
    """
    source = Path(source).as_posix()
    config = load_folder_config(source, **hub)
    model_class = MODEL_CLASS_BY_HEAD_TYPE[get_head_type(config)]
    # a folder with int8 weights contains a quantization config
    quantizes = quantize is not None and not has_int8_weights(config)
    quantization = {"quantization_config": ParakeetInt8Config()} if quantizes else {}
    # "auto" keeps the dtype in the files
    model: ParakeetPreTrainedModel = model_class.from_pretrained(
        source, config=config, dtype=dtype if quantizes and dtype else "auto", **quantization, **hub
    )
    if dtype is not None:
        convert_weights(model, dtype)
    return model.eval(), ParakeetProcessor.from_pretrained(source, **hub)


def load_archive(
    archive: Archive, dtype: torch.dtype | None = None
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Load the model and the processor from an open `.nemo` file, and name the file in every error message.

    Args:
        archive: open `.nemo` file.
        dtype: dtype of the weights; None to keep the dtype in the file.

    Returns:
        The model in eval mode and its processor.

    Raises:
        NemoError: the file is damaged, or contains an unsupported setting or weight.
    """
    with name_archive_in_errors(archive.path):
        return build_from_archive(archive, dtype)


@contextmanager
def name_archive_in_errors(path: Path) -> Iterator[None]:
    """Convert errors about the contents of a `.nemo` file to NemoError with a message that names the file.

    Args:
        path: path of the `.nemo` file.

    Raises:
        NemoError: the `with` block raised an error about the contents of the file.
    """
    try:
        yield
    except KeyError as error:
        raise NemoError(f"{SETTINGS_FILE} of {path} has no setting {error}") from error
    except NemoError as error:
        raise NemoError(f"{error} (in {path})" if path.name not in str(error) else str(error)) from error
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise NemoError(f"a setting in {SETTINGS_FILE} of {path} has an invalid value: {error}") from error


def build_from_archive(
    archive: Archive, dtype: torch.dtype | None
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Build the model and the processor from the settings, weights and tokenizer files of an open `.nemo` file.

    Args:
        archive: open `.nemo` file.
        dtype: dtype of the weights; None to keep the dtype in the file.

    Returns:
        The model in eval mode and its processor.

    Raises:
        NemoError: the file is damaged, or contains an unsupported setting or weight.
        KeyError: a setting that has no default is missing. `load_archive` converts this error to NemoError.
    """
    contents = read_contents(archive)
    model = build_empty_model(contents.config)
    load_weights(model, contents.weights, archive, dtype)
    # `load_weights` has checked the number of mel bins, so a damaged file cannot request a huge filter bank here
    feature_extractor = ParakeetFeatureExtractor(**read_extractor_fields(contents.settings))
    processor = ParakeetProcessor(
        feature_extractor,
        contents.tokenizer,
        decoder_type=contents.head_type,
        subsampling_factor=model.config.encoder_config.subsampling_factor,
    )
    return model.eval(), processor


def build_empty_model(config: Any) -> ParakeetPreTrainedModel:
    """Build a model whose parameters have shapes, but no values and no memory.

    Args:
        config: configuration of a model with a head.

    Returns:
        The model on the meta device.

    Raises:
        NemoError: a parameter would have more bytes than a number of 64 bits can express.
    """
    try:
        with torch.device("meta"):
            return MODEL_CLASS_BY_HEAD_TYPE[get_head_type(config)](config)
    except RuntimeError as error:
        raise NemoError(f"a size in the configuration is too large: {error}") from error


def read_contents(archive: Archive) -> ArchiveContents:
    """Read and check the settings and the tokenizer of an open `.nemo` file, and map its weights.

    Args:
        archive: open `.nemo` file.

    Raises:
        NemoError: the file is damaged, or contains an unsupported setting.
        KeyError: a setting that has no default is missing.
    """
    raw_settings = parse_settings(archive.read(SETTINGS_FILE))
    nemo_weights = archive.read_weights()
    settings = resolve_interpolations(raw_settings)
    head_type = detect_head_type(settings)
    is_hybrid = head_type != "ctc" and has_ctc_head(settings, nemo_weights)
    unknown_settings = check_settings(settings, is_transducer=head_type != "ctc", has_ctc_head=is_hybrid)
    if unknown_settings:
        logger.warning(
            "%s has unknown settings in sections that inference does not use. They are ignored: %s",
            archive.path,
            ", ".join(unknown_settings),
        )
    settings = fill_missing_sizes(settings, {name: tensor.shape for name, tensor in nemo_weights.items()})
    tokenizer = read_tokenizer(settings, archive.read_artifact, head_type)
    check_vocabulary(settings, len(tokenizer) - 1)
    config = build_config(settings, raw_settings, tokenizer, head_type, is_hybrid)
    return ArchiveContents(head_type, settings, nemo_weights, tokenizer, config)


def build_config(
    settings: Settings, raw_settings: Settings, tokenizer: ParakeetTokenizer, head_type: str, is_hybrid: bool
) -> Any:
    """Build the model configuration from the settings of a `.nemo` file.

    Args:
        settings: checked settings, with interpolations resolved and missing sizes filled in.
        raw_settings: settings with unresolved interpolations. The configuration stores them for `export_nemo`.
        tokenizer: tokenizer whose last token is the blank.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
        is_hybrid: whether the model is a transducer that also has a CTC head.

    Raises:
        NemoError: a value is not supported.
        KeyError: a setting that has no default is missing.
    """
    # the labels have the ids 0 to num_labels - 1, and the blank has the id num_labels
    num_labels = len(tokenizer) - 1
    # after `max_symbols_per_step` labels on one frame, decoding moves to the next frame; with `forced_blanks`, the
    # output of `generate` contains a blank for this move, as in NeMo
    return MODEL_CLASS_BY_HEAD_TYPE[head_type].config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        nemo_config=dump_without_pieces(raw_settings, tokenizer.convert_ids_to_tokens(range(num_labels))),
        **({} if head_type == "ctc" else {"blank_token_id": num_labels, "forced_blanks": True}),
        **read_config_fields(settings, head_type, is_hybrid),
    )


def read_tokenizer(settings: Settings, read_artifact: Callable[[str], bytes], head_type: str) -> ParakeetTokenizer:
    """Build the tokenizer from the SentencePiece models in a `.nemo` file.

    An aggregate tokenizer (`tokenizer.type: agg`) has one SentencePiece model per language; other tokenizers have one.

    Args:
        settings: resolved settings of the `.nemo` file.
        read_artifact: `read_artifact(reference)` returns the content of the file that a setting refers to.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.

    Raises:
        NemoError: a setting is not supported, or a SentencePiece model is missing or damaged.
        KeyError: a setting in the section `tokenizer` is missing.
    """
    section = settings["tokenizer"]
    language_sections = [section]
    if section["type"].lower() == "agg":
        languages = section.get("langs") or {}
        for language, language_section in languages.items():
            check_section(language_section, f"tokenizer.langs.{language}", SECTIONS["tokenizer"])
        language_sections = list(languages.values())
    if not language_sections:
        raise NemoError(
            "`tokenizer.langs` must have at least one language, but it is empty: export the model from "
            "NeMo again, with its tokenizers"
        )
    serialized_models = [read_artifact(language_section["model_path"]) for language_section in language_sections]
    return build_tokenizer(serialized_models, head_type)


def dump_without_pieces(raw_settings: Settings, pieces: list[str]) -> str:
    """Convert the settings to YAML text for `config.nemo_config`, with a placeholder for each list of all pieces.

    The configuration stores the settings as text because JSON would sort the keys.

    Args:
        raw_settings: settings with unresolved interpolations.
        pieces: tokens of the tokenizer in the order of their ids, without the blank.
    """
    nemo_pieces = strip_duplicate_suffixes(pieces)

    def replace_pieces(value: Any, path: str) -> Any:
        """Copy the setting or section at a dotted path, and replace each list of all pieces by the placeholder."""
        if isinstance(value, dict):
            return {key: replace_pieces(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        return PIECES_PLACEHOLDER if path in VOCABULARY_LISTS and value == nemo_pieces else value

    return dump_settings(replace_pieces(raw_settings, "")).decode()


def load_weights(
    model: ParakeetPreTrainedModel,
    nemo_weights: Mapping[str, Tensor],
    archive: Archive,
    dtype: torch.dtype | None = None,
) -> None:
    """Load the weights of a `.nemo` file into a model, and check that they match the model's state dict.

    Args:
        model: model on the meta device, changed in place.
        nemo_weights: weights with NeMo's names, views of the memory-mapped file.
        archive: open `.nemo` file. The memory pages of each weight are released after the check for NaN and infinity;
            the system reads them again on the next use.
        dtype: dtype of the weights; None to keep the dtype in the file.

    Raises:
        NemoError: names, shapes or dtypes do not match, or a weight contains NaN or infinity.
    """
    weights = {convert_nemo_name(key): tensor for key, tensor in nemo_weights.items() if key not in FEATURE_BUFFER_KEYS}
    parameters = model.state_dict()
    check_names_and_shapes(weights, parameters)
    previous_addresses: set[int] = set()
    for name, tensor in weights.items():
        if tensor.is_floating_point() != parameters[name].is_floating_point():
            raise NemoError(f"{name!r} is {tensor.dtype}: quantised weights are not implemented, save them in float32")
        check_finite(name, tensor)
        # NeMo stores tied weights once, but each parameter of the model needs separate memory
        is_tied = tensor.data_ptr() in previous_addresses
        previous_addresses.add(tensor.data_ptr())
        target_dtype = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        weights[name] = tensor.to(target_dtype, copy=is_tied)
        archive.release_memory(tensor)
    model.load_state_dict(weights, assign=True)
    compute_buffers(model)
    if dtype is not None:
        model.config.dtype = dtype


def check_names_and_shapes(weights: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Check that the weights of a file have the names and shapes of the model's state dict.

    Args:
        weights: weights of the file, with our names.
        parameters: state dict of the model.

    Raises:
        NemoError: a name or a shape differs.
    """
    missing, unexpected = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    if missing or unexpected:
        raise NemoError(f"the weights do not match the settings: missing {missing[:5]}, unexpected {unexpected[:5]}")
    differences = [
        f"{name} has shape {list(weights[name].shape)} instead of {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if weights[name].shape != parameter.shape
    ]
    if differences:
        raise NemoError(f"the weights do not match the settings: {'; '.join(differences[:5])}")


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a weight contains no NaN and no infinity; raise NemoError otherwise.

    Args:
        name: name of the weight, used in the error message.
        tensor: values of the weight, of any shape.
    """
    # the minimum or the maximum is NaN or infinite if any value is
    if tensor.is_floating_point() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
        raise NemoError(f"the weight {name!r} contains NaN or infinity: the file is damaged, copy or save it again")


def compute_buffers(model: ParakeetPreTrainedModel) -> None:
    """Initialise the buffers that are still on the meta device because checkpoints do not contain them.

    Args:
        model: model whose weights are loaded; changed in place.
    """
    for module in model.modules():
        meta_names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in meta_names:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if meta_names:
            # `_init_weights` computes the values of all buffers of the module
            model._init_weights(module)


def describe_head(config: Any) -> str:
    """Describe the head of a model for a reader, for example "TDT and CTC (hybrid)".

    Args:
        config: configuration of a model with a head.
    """
    suffix = " and CTC (hybrid)" if getattr(config, "ctc_head", False) else ""
    return HEAD_NAMES[get_head_type(config)] + suffix


__all__ = ["NemoError", "build_empty_model", "describe_head", "load_config", "load_nemo"]

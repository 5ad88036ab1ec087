"""Writes a model and its processor to a `.nemo` file that NeMo can restore.

`fields.py` maps fields of the configuration to settings, `weights.py` translates the names of weights,
`sentencepiece.py` builds the tokenizer files, and `archive.py` writes the tar archive.
"""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration_parakeet import get_blank_id, get_head_type
from ..feature_extraction_parakeet import compute_mel_triangles
from .archive import SETTINGS_FILE, NemoError, write_archive
from .fields import (
    ENCODER_FIELDS,
    EXTRACTOR_FIELDS,
    NEMO_MODULES_PREFIX,
    VOCABULARY_COUNTS,
    VOCABULARY_LISTS,
    Field,
    select_model_fields,
)
from .sentencepiece import build_vocabulary_files, get_sentencepiece_models, strip_duplicate_suffixes
from .settings import Settings, dump_settings, find_setting, parse_settings, put_setting, resolve_interpolations
from .weights import FEATURE_BUFFER_KEYS, to_nemo_name

logger = logging.get_logger(__name__)

NEMO_MODELS_PREFIX = "nemo.collections.asr.models."

# encoder field that has no setting in NeMo -> the only value that NeMo supports
FIXED_ENCODER_FIELDS = {"hidden_act": "silu", "subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}

# setting in the section `tokenizer` -> name of the file that the setting refers to
TOKENIZER_FILE_NAMES = {
    "model_path": "tokenizer.model",
    "vocab_path": "vocab.txt",
    "spe_tokenizer_vocab": "tokenizer.vocab",
}


def export_nemo(model: Any, processor: Any, path: str | Path) -> None:
    """Write a `.nemo` file with settings, weights and tokenizer that NeMo can restore.

    If the checkpoint came from a `.nemo` file, the original settings (`config.nemo_config`) are written unchanged,
    except for settings whose configuration fields have changed. An existing file is replaced only after the new file is
    complete.

    Args:
        model: `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`, on any device.
        processor: processor of the model.
        path: path of the file to write; it must end in `.nemo`.

    Raises:
        NemoError: NeMo cannot represent the model or the tokenizer.
        FileNotFoundError: the folder of the file does not exist.
    """
    path = Path(path)
    if path.suffix != ".nemo":
        raise NemoError(f"the path must end in .nemo, got {path}: NeMo recognises its files by this suffix")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} for {path.name} does not exist: create it")
    config, feature_extractor = model.config, processor.feature_extractor
    check_config(config)
    num_labels = config.vocab_size - 1
    pieces = processor.tokenizer.convert_ids_to_tokens(range(num_labels))
    serialized_models = get_sentencepiece_models(processor.tokenizer, num_labels)
    settings = make_initial_settings(config)
    tokenizer_files = add_tokenizer_settings(settings, serialized_models)
    add_pieces(settings, pieces, has_ctc_head(config))
    add_fields(settings, config, feature_extractor)
    files = {SETTINGS_FILE: dump_settings(settings), **tokenizer_files}
    write_archive(path, files, to_nemo_state_dict(model, feature_extractor, settings))


def has_ctc_head(config: Any) -> bool:
    """Return whether a model configuration describes a hybrid, a transducer that also has a CTC head.

    Args:
        config: configuration of a model with a head.
    """
    return bool(getattr(config, "ctc_head", False))


def check_config(config: Any) -> None:
    """Check that NeMo can represent a model configuration.

    Args:
        config: configuration of a model with a head.

    Raises:
        NemoError: NeMo cannot represent the configuration.
    """
    head_type, blank_id = get_head_type(config), get_blank_id(config)
    if getattr(config, "quantization_config", None) is not None:
        raise NemoError("a .nemo file requires float weights, got an int8 model: load the model without `quantize`")
    if head_type not in ("ctc", "rnnt", "tdt"):
        raise NemoError(f"only models with a CTC, RNN-T or TDT head can be exported, got {config.model_type!r}")
    if blank_id != config.vocab_size - 1:
        raise NemoError(
            f"the blank must be the last token in NeMo, with the id {config.vocab_size - 1}, got the id {blank_id}"
        )
    if head_type != "ctc" and config.hidden_act not in ("relu", "tanh", "sigmoid"):
        raise NemoError(
            f"`hidden_act` must be relu, tanh or sigmoid in NeMo's joint network, got {config.hidden_act!r}"
        )
    check_encoder_config(config.encoder_config)


def check_encoder_config(encoder_config: Any) -> None:
    """Check that NeMo can represent an encoder configuration.

    A warning is logged if a `.nemo` file cannot store the attention context.

    Args:
        encoder_config: configuration of the encoder.

    Raises:
        NemoError: NeMo cannot represent the configuration.
    """
    for name, nemo_value in FIXED_ENCODER_FIELDS.items():
        value = getattr(encoder_config, name)
        if value != nemo_value:
            raise NemoError(f"`encoder_config.{name}` must be {nemo_value!r} in NeMo, got {value!r}")
    # the context is [left, right] or [left, right, chunk] in frames; -1 means no limit
    has_limited_context = max(encoder_config.attention_context_size) >= 0
    # separate global projections are extra weights, which NeMo creates only for local attention
    if encoder_config.global_tokens and encoder_config.global_attn_separate and not has_limited_context:
        raise NemoError(
            "NeMo supports global tokens only with local attention, but the attention context is unlimited: set a "
            "limited context with `model.set_attention_context`"
        )
    if encoder_config.attention_bias != encoder_config.convolution_bias:
        raise NemoError("`attention_bias` and `convolution_bias` must be equal, because NeMo has one setting for both")
    if encoder_config.intermediate_size % encoder_config.hidden_size:
        raise NemoError(
            f"`intermediate_size` must be a multiple of `hidden_size` ({encoder_config.hidden_size}) in NeMo, got "
            f"{encoder_config.intermediate_size}"
        )
    if encoder_config.attention_context_style == "chunked_limited_with_rc" and has_limited_context:
        logger.warning(
            "A .nemo file cannot store the attention context %s of the style chunked_limited_with_rc. NeMo will start "
            "with full attention; set the context again in NeMo.",
            list(encoder_config.attention_context_size),
        )


def make_initial_settings(config: Any) -> dict[str, Any]:
    """Create the settings of an export before the tokenizer, the vocabulary and the configuration fields are written.

    If the checkpoint came from a `.nemo` file, these are the original settings, which `config.nemo_config` contains as
    YAML text. Otherwise they are default settings for the type of head. Sizes of 0 or -1 in the default settings are
    placeholders, which `add_pieces` and `add_fields` replace.

    Args:
        config: model configuration.
    """
    if config.nemo_config is not None:
        return parse_settings(config.nemo_config.encode())
    head_type, hidden_size = get_head_type(config), config.encoder_config.hidden_size
    settings = build_common_settings(config.encoder_config)
    ctc_decoder = {
        "_target_": f"{NEMO_MODULES_PREFIX}ConvASRDecoder",
        "feat_in": hidden_size,
        "num_classes": -1,
        "vocabulary": [],
    }
    if head_type == "ctc":
        return {**settings, "decoder": ctc_decoder, "target": f"{NEMO_MODELS_PREFIX}ctc_bpe_models.EncDecCTCModelBPE"}
    # this includes `target`, NeMo's class of a transducer, which is overwritten for a hybrid
    settings |= build_transducer_settings(head_type, hidden_size)
    if has_ctc_head(config):
        settings["aux_ctc"] = {"decoder": ctc_decoder, "decoding": {"strategy": "greedy_batch", "greedy": {}}}
        settings["target"] = f"{NEMO_MODELS_PREFIX}hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    return settings


def build_common_settings(encoder_config: Any) -> dict[str, Any]:
    """Build the default settings that CTC, RNN-T and TDT models have in common.

    Values that correspond to a field of the encoder configuration or of the feature extractor, such as `n_layers`, are
    placeholders. `add_fields` replaces each value that differs from the field.

    Args:
        encoder_config: configuration of the encoder.

    Returns:
        The sections `tokenizer`, `preprocessor`, `encoder` and `decoding`, the root setting `sample_rate`, and the keys
        of the data sets with the value None.
    """
    num_mel_bins = encoder_config.num_mel_bins
    return {
        "sample_rate": 16000,
        "tokenizer": {"dir": "tokenizer", "type": "bpe"},
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "preprocessor": {
            "_target_": f"{NEMO_MODULES_PREFIX}AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01,
            "window": "hann", "features": num_mel_bins, "n_fft": 512, "log": True,
            "frame_splicing": 1, "dither": 1e-05, "pad_to": 0, "pad_value": 0.0,
        },
        "encoder": {
            "_target_": f"{NEMO_MODULES_PREFIX}ConformerEncoder",
            "feat_in": num_mel_bins, "feat_out": -1, "n_layers": 1, "d_model": encoder_config.hidden_size,
            "use_bias": True, "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 256,
            "causal_downsampling": False, "ff_expansion_factor": 4, "self_attention_model": "rel_pos", "n_heads": 8,
            "att_context_size": [-1, -1], "att_context_style": encoder_config.attention_context_style,
            "xscaling": True, "untie_biases": True, "pos_emb_max_len": 5000,
            "conv_kernel_size": 9, "conv_norm_type": "batch_norm", "conv_context_size": None,
            "dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.0, "dropout_att": 0.1,
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {}},
    }  # fmt: skip


def build_transducer_settings(head_type: str, hidden_size: int) -> dict[str, Any]:
    """Build the default settings that a transducer has in addition to the common settings.

    Sizes of 0 or -1 and the durations [0] are placeholders: `add_pieces` writes the vocabulary size, and `add_fields`
    writes the widths, the numbers of layers and the durations.

    Args:
        head_type: `"rnnt"` or `"tdt"`.
        hidden_size: width of the encoder.

    Returns:
        The sections `model_defaults`, `decoder`, `joint`, `decoding` and `loss`, and the root settings `labels` and
        `target`.
    """
    loss: dict[str, Any] = {"loss_name": "default"}
    decoding: dict[str, Any] = {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}}
    if head_type == "tdt":
        loss = {"loss_name": "tdt", "tdt_kwargs": {"durations": [0], "sigma": 0.0, "omega": 0.0, "clamp": -1.0}}
        decoding |= {"model_type": "tdt", "durations": [0]}
    return {
        # NeMo reads the widths from `model_defaults` as well
        "model_defaults": {"enc_hidden": hidden_size, "pred_hidden": 0, "joint_hidden": 0},
        "decoder": {
            "_target_": f"{NEMO_MODULES_PREFIX}RNNTDecoder",
            "normalization_mode": None, "random_state_sampling": False, "blank_as_pad": True,
            "prednet": {"pred_hidden": 0, "pred_rnn_layers": 0, "t_max": None, "dropout": 0.0},
            "vocab_size": -1,
        },
        "joint": {
            "_target_": f"{NEMO_MODULES_PREFIX}RNNTJoint",
            "log_softmax": None, "preserve_memory": False, "fuse_loss_wer": False,
            "jointnet": {
                "joint_hidden": 0, "activation": "relu", "dropout": 0.0,
                "encoder_hidden": hidden_size, "pred_hidden": 0,
            },
            "num_classes": -1, "num_extra_outputs": 0, "vocabulary": [],
        },
        "decoding": decoding,
        "loss": loss,
        "labels": [],
        "target": f"{NEMO_MODELS_PREFIX}rnnt_bpe_models.EncDecRNNTBPEModel",
    }  # fmt: skip


def add_tokenizer_settings(settings: dict[str, Any], serialized_models: list[bytes]) -> dict[str, bytes]:
    """Write the section `tokenizer` of the settings, and build the tokenizer files that it refers to.

    Args:
        settings: settings of the export, changed in place.
        serialized_models: SentencePiece models, one per language.

    Returns:
        Name of each tokenizer file in the archive -> content of the file.

    Raises:
        NemoError: the number of languages in the settings differs from the number of models.
    """
    files: dict[str, bytes] = {}
    language_sections = make_language_sections(settings, len(serialized_models))
    for language_section, serialized_model in zip(language_sections, serialized_models, strict=True):
        file_contents = (serialized_model, *build_vocabulary_files(serialized_model))
        for key, content in zip(TOKENIZER_FILE_NAMES, file_contents, strict=True):
            name = choose_artifact_name(language_section.get(key), serialized_model, key)
            if name in files:
                # two languages refer to the same file, but their models differ
                name = choose_artifact_name(None, serialized_model, key)
            language_section[key] = f"nemo:{name}"
            files[name] = content
    return files


def make_language_sections(settings: dict[str, Any], num_languages: int) -> list[dict[str, Any]]:
    """Return the settings sections that refer to the tokenizer files, one section per language.

    Args:
        settings: settings of the export, changed in place. For one language, the section `tokenizer` is changed to a
            single SentencePiece tokenizer (type `bpe`).
        num_languages: number of SentencePiece models.

    Raises:
        NemoError: there are several models, but the settings have a different number of languages.
    """
    section = settings.get("tokenizer") or {}
    languages = section.get("langs") if section.get("type") == "agg" else None
    if languages is not None and len(languages) == num_languages:
        return list(languages.values())
    if num_languages > 1:
        raise NemoError(f"the tokenizer has {num_languages} languages, but `tokenizer.langs` has a different number")
    # If the original tokenizer was an aggregate of languages, none of its settings apply to the new single tokenizer.
    # NeMo requires the key `dir` and does not use it.
    original_section = section if languages is None else {}
    settings["tokenizer"] = {"dir": "tokenizer", **original_section, "type": "bpe"}
    return [settings["tokenizer"]]


def choose_artifact_name(reference: str | None, serialized_model: bytes, key: str) -> str:
    """Choose the name of a tokenizer file in the archive.

    Args:
        reference: current value of the setting. If it has the form `nemo:<name>`, that name is kept; None to create a
            new name.
        serialized_model: SentencePiece model; a digest of the model makes a new name unique.
        key: name of the setting, a key of `TOKENIZER_FILE_NAMES`.
    """
    match = re.fullmatch(r"nemo:([\w.-]+)", reference or "")
    if match:
        return match[1]
    # file names in NeMo's archives start with 32 hexadecimal digits
    digest = hashlib.sha256(serialized_model + key.encode()).hexdigest()[:32]
    return f"{digest}_{TOKENIZER_FILE_NAMES[key]}"


def add_pieces(settings: dict[str, Any], pieces: list[str], is_hybrid: bool) -> None:
    """Write the vocabulary and its size into all settings that contain them.

    Args:
        settings: settings of the export, changed in place.
        pieces: tokens of the tokenizer in the order of their ids, without the blank.
        is_hybrid: whether the model is a transducer that also has a CTC head. Otherwise the section `aux_ctc` is not
            changed, because NeMo does not read it.
    """
    nemo_pieces = strip_duplicate_suffixes(pieces)

    def is_read_by_nemo(path: str) -> bool:
        """Return whether NeMo reads the setting at a dotted path."""
        return is_hybrid or not path.startswith("aux_ctc.")

    for path in filter(is_read_by_nemo, VOCABULARY_LISTS):
        # the setting can also be text: an interpolation, or the placeholder for the list in `config.nemo_config`
        if isinstance(find_setting(settings, path), (str, list)):
            put_setting(settings, path, nemo_pieces)
    for path in filter(is_read_by_nemo, VOCABULARY_COUNTS):
        if find_setting(settings, path) not in (None, len(nemo_pieces)):
            put_setting(settings, path, len(nemo_pieces))


def add_fields(settings: dict[str, Any], config: Any, feature_extractor: Any) -> None:
    """Write the fields of the model configuration and of the feature extractor into the settings.

    A setting that already has the value of the field is not changed, so interpolations in the original file are kept.

    Args:
        settings: settings of the export, changed in place.
        config: model configuration.
        feature_extractor: feature extractor of the model.
    """
    resolved_settings = resolve_interpolations(settings)
    for field, owner in list_fields_with_owners(config, feature_extractor):
        if field.get_value_from_owner(owner) == field.get_value_from_settings(resolved_settings):
            continue
        nemo_value = field.get_nemo_value(owner, resolved_settings)
        put_setting(settings, field.setting, nemo_value)
        for path in field.copies:
            put_setting(settings, path, nemo_value, create=False)


def list_fields_with_owners(config: Any, feature_extractor: Any) -> Iterator[tuple[Field, Any]]:
    """Yield each field that a `.nemo` file stores, with the object that has the field.

    Args:
        config: model configuration.
        feature_extractor: feature extractor of the model.

    Yields:
        The field, and its owner: the encoder configuration, `config`, or `feature_extractor`.
    """
    for field in ENCODER_FIELDS:
        yield field, config.encoder_config
    for field in select_model_fields(get_head_type(config), has_ctc_head(config)):
        yield field, config
    for field in EXTRACTOR_FIELDS:
        yield field, feature_extractor


def to_nemo_state_dict(model: Any, feature_extractor: Any, settings: Settings) -> dict[str, Tensor]:
    """Convert the state dict of a model to NeMo's names, and add the buffers of NeMo's feature extractor.

    Args:
        model: `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`, on any device.
        feature_extractor: feature extractor of the model; it defines the window and the mel filters.
        settings: NeMo settings of the exported model; they decide whether the joint network has a dropout layer, which
            changes the names of the weights.

    Returns:
        NeMo's name -> tensor on the CPU.
    """
    dropout = find_setting(resolve_interpolations(settings), "joint.jointnet.dropout")
    window = torch.hann_window(feature_extractor.win_length, periodic=False)
    mel_filters = compute_mel_filters(feature_extractor)
    nemo_state_dict = dict(zip(FEATURE_BUFFER_KEYS, (window, mel_filters), strict=True))
    for name, tensor in model.state_dict().items():
        nemo_name = to_nemo_name(name, is_transducer=hasattr(model, "joint"), has_joint_dropout=bool(dropout))
        # `torch.save` would write the whole storage of a view
        nemo_state_dict[nemo_name] = ensure_own_storage(tensor)
    return nemo_state_dict


def compute_mel_filters(feature_extractor: Any) -> Tensor:
    """Compute the mel filters of a feature extractor with the rounding of NeMo.

    NeMo rounds the triangular filters to float32 before it multiplies them by their norm.

    Args:
        feature_extractor: a `ParakeetFeatureExtractor`.

    Returns:
        (1, F, n_fft / 2 + 1) float32 filters, F mel bins.
    """
    triangles, norm = compute_mel_triangles(
        feature_extractor.feature_size, feature_extractor.n_fft, feature_extractor.sampling_rate
    )
    filters = triangles.astype(np.float32) * norm[:, None]
    return torch.from_numpy(filters.astype(np.float32))[None]


def ensure_own_storage(tensor: Tensor) -> Tensor:
    """Return a contiguous CPU tensor that fills its storage; copy the values if the tensor is a part of a storage.

    Args:
        tensor: tensor of any shape, on any device.
    """
    tensor = tensor.detach().cpu().contiguous()
    fills_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills_storage else tensor.clone()


__all__ = ["export_nemo"]

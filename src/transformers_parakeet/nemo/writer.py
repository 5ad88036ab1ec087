"""Writes a model and its processor to a `.nemo` file that NeMo can restore.

`fields.py` says which setting stores which field, `weights.py` translates the names of weights, `sentencepiece.py`
builds the tokenizer files, and `archive.py` writes the container.
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
from .archive import SETTINGS, NemoError, write_archive
from .fields import (
    ENCODER_FIELDS,
    EXTRACTOR_FIELDS,
    MODULES,
    VOCABULARY_COUNTS,
    VOCABULARY_LISTS,
    Field,
    select_model_fields,
)
from .sentencepiece import remove_duplicate_marks, sentencepiece_models, vocabulary_files
from .settings import Settings, dump_settings, find_setting, parse_settings, put_setting, resolve_interpolations
from .weights import FEATURE_BUFFER_KEYS, to_nemo_name

logger = logging.get_logger(__name__)

MODELS = "nemo.collections.asr.models."

# encoder fields that NeMo cannot change, with their values there
FIXED_FIELDS = {"hidden_act": "silu", "subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}

# settings of a tokenizer section -> name of the file that the setting refers to
TOKENIZER_FILES = {
    "model_path": "tokenizer.model",
    "vocab_path": "vocab.txt",
    "spe_tokenizer_vocab": "tokenizer.vocab",
}


def export_nemo(model: Any, processor: Any, path: str | Path) -> None:
    """Write a `.nemo` file that NeMo can restore: settings, weights and tokenizer.

    If the checkpoint came from a `.nemo` file, its settings (`config.nemo_config`) are written back unchanged, except
    for fields of the configuration that have changed since. An existing file is replaced only after the new one is
    complete.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`, on any device.
        processor: its processor.
        path: the file to write; its name must end in `.nemo`.

    Raises:
        NemoError: NeMo cannot express a part of the model or of the tokenizer.
        FileNotFoundError: the folder of the file does not exist.
    """
    path = Path(path)
    if path.suffix != ".nemo":
        raise NemoError(f"the path must end in .nemo, got {path}: NeMo recognises its files by this suffix")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} for {path.name} does not exist: create it")
    config, extractor = model.config, processor.feature_extractor
    check_config(config)
    num_labels = config.vocab_size - 1
    tokenizer_models = sentencepiece_models(processor.tokenizer, num_labels)
    settings = initial_settings(config)
    tokenizer_files = put_tokenizer(settings, tokenizer_models)
    put_pieces(settings, processor.tokenizer.convert_ids_to_tokens(range(num_labels)), has_ctc_head(config))
    put_fields(settings, config, extractor)
    files = {SETTINGS: dump_settings(settings), **tokenizer_files}
    write_archive(path, files, nemo_state_dict(model, extractor, settings))


def has_ctc_head(config: Any) -> bool:
    """Return whether a configuration is that of a hybrid, a transducer with a CTC head."""
    return bool(getattr(config, "ctc_head", False))


def check_config(config: Any) -> None:
    """Refuse a model configuration that NeMo cannot express."""
    kind, blank_id = get_head_type(config), get_blank_id(config)
    if kind not in ("ctc", "rnnt", "tdt"):
        raise NemoError(f"the model must have a CTC, RNN-T or TDT head, got {config.model_type!r}: export such a model")
    if blank_id != config.vocab_size - 1:
        raise NemoError(f"the blank must be the last of {config.vocab_size} tokens in NeMo, got id {blank_id}")
    if kind != "ctc" and config.hidden_act not in ("relu", "tanh", "sigmoid"):
        raise NemoError(
            f"`hidden_act` must be relu, tanh or sigmoid in NeMo's joint network, got {config.hidden_act!r}"
        )
    check_encoder_config(config.encoder_config)


def check_encoder_config(encoder: Any) -> None:
    """Refuse an encoder configuration that NeMo cannot express, and warn about a context that the file cannot hold."""
    for name, value in FIXED_FIELDS.items():
        if getattr(encoder, name) != value:
            raise NemoError(f"`encoder_config.{name}` must be {value!r} in NeMo, got {getattr(encoder, name)!r}")
    is_limited = max(encoder.attention_context_size) >= 0
    if encoder.global_tokens and encoder.global_attn_separate and not is_limited:
        raise NemoError(
            "NeMo has global tokens in local attention only, but the attention context is unlimited: choose a limited "
            "one with `model.set_attention_context`"
        )
    if encoder.attention_bias != encoder.convolution_bias:
        raise NemoError("`attention_bias` and `convolution_bias` must be equal, because NeMo has one setting for both")
    if encoder.intermediate_size % encoder.hidden_size:
        raise NemoError(
            f"`intermediate_size` must be a multiple of `hidden_size` ({encoder.hidden_size}) in NeMo, got "
            f"{encoder.intermediate_size}"
        )
    if encoder.attention_context_style == "chunked_limited_with_rc" and is_limited:
        logger.warning(
            "A .nemo file cannot hold the attention context %s of the style chunked_limited_with_rc: NeMo starts with "
            "full attention, choose the context there again.",
            list(encoder.attention_context_size),
        )


def initial_settings(config: Any) -> dict[str, Any]:
    """Return the settings that an export starts from.

    They are the settings of the `.nemo` file that the checkpoint came from (YAML text in `config.nemo_config`), or else
    those of a new model of its kind. The caller then writes the tokenizer files, the vocabulary and the fields of the
    configuration into them, and replaces sizes that are 0 or -1 here.

    Args:
        config: configuration of the model.
    """
    if config.nemo_config is not None:
        return parse_settings(config.nemo_config.encode())
    kind, hidden_size = get_head_type(config), config.encoder_config.hidden_size
    settings = encoder_settings(config.encoder_config)
    ctc_decoder = {
        "_target_": f"{MODULES}ConvASRDecoder",
        "feat_in": hidden_size,
        "num_classes": -1,
        "vocabulary": [],
    }
    if kind == "ctc":
        return {**settings, "decoder": ctc_decoder, "target": f"{MODELS}ctc_bpe_models.EncDecCTCModelBPE"}
    settings |= transducer_settings(kind, hidden_size)
    if has_ctc_head(config):
        settings["aux_ctc"] = {"decoder": ctc_decoder, "decoding": {"strategy": "greedy_batch", "greedy": {}}}
        settings["target"] = f"{MODELS}hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    return settings


def encoder_settings(encoder: Any) -> dict[str, Any]:
    """Return the settings that a new model of any kind has.

    Args:
        encoder: configuration of its encoder.
    """
    num_mel_bins = encoder.num_mel_bins
    return {
        "sample_rate": 16000,
        "tokenizer": {"dir": "tokenizer", "type": "bpe"},
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "preprocessor": {
            "_target_": f"{MODULES}AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01,
            "window": "hann", "features": num_mel_bins, "n_fft": 512, "log": True,
            "frame_splicing": 1, "dither": 1e-05, "pad_to": 0, "pad_value": 0.0,
        },
        "encoder": {
            "_target_": f"{MODULES}ConformerEncoder",
            "feat_in": num_mel_bins, "feat_out": -1, "n_layers": 1, "d_model": encoder.hidden_size,
            "use_bias": True, "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 256,
            "causal_downsampling": False, "ff_expansion_factor": 4, "self_attention_model": "rel_pos", "n_heads": 8,
            "att_context_size": [-1, -1], "att_context_style": encoder.attention_context_style,
            "xscaling": True, "untie_biases": True, "pos_emb_max_len": 5000,
            "conv_kernel_size": 9, "conv_norm_type": "batch_norm", "conv_context_size": None,
            "dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.0, "dropout_att": 0.1,
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {}},
    }  # fmt: skip


def transducer_settings(kind: str, hidden_size: int) -> dict[str, Any]:
    """Return the further settings of a new transducer.

    Args:
        kind: `"rnnt"` or `"tdt"`.
        hidden_size: width of the encoder.
    """
    loss: dict[str, Any] = {"loss_name": "default"}
    decoding: dict[str, Any] = {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}}
    if kind == "tdt":
        loss = {"loss_name": "tdt", "tdt_kwargs": {"durations": [0], "sigma": 0.0, "omega": 0.0, "clamp": -1.0}}
        decoding |= {"model_type": "tdt", "durations": [0]}
    return {
        # NeMo also reads the widths from here
        "model_defaults": {"enc_hidden": hidden_size, "pred_hidden": 0, "joint_hidden": 0},
        "decoder": {
            "_target_": f"{MODULES}RNNTDecoder",
            "normalization_mode": None, "random_state_sampling": False, "blank_as_pad": True,
            "prednet": {"pred_hidden": 0, "pred_rnn_layers": 0, "t_max": None, "dropout": 0.0},
            "vocab_size": -1,
        },
        "joint": {
            "_target_": f"{MODULES}RNNTJoint",
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
        "target": f"{MODELS}rnnt_bpe_models.EncDecRNNTBPEModel",
    }  # fmt: skip


def put_tokenizer(settings: dict[str, Any], models: list[bytes]) -> dict[str, bytes]:
    """Write the section `tokenizer`, with one sub-section per language if there are several models.

    Args:
        settings: the settings to change.
        models: SentencePiece models, one per language.

    Returns:
        The tokenizer files by their name in the archive.

    Raises:
        NemoError: the settings name another number of languages.
    """
    section = settings.get("tokenizer") or {}
    languages = section.get("langs") if section.get("type") == "agg" else None
    if languages is not None and len(languages) == len(models):
        sections = list(languages.values())
    elif len(models) > 1:
        raise NemoError(f"the tokenizer has {len(models)} languages, `tokenizer.langs` must have the same number")
    else:
        # NeMo requires `dir` and does not use it; an aggregate has become a single tokenizer
        settings["tokenizer"] = {"dir": "tokenizer", **(section if languages is None else {}), "type": "bpe"}
        sections = [settings["tokenizer"]]
    files: dict[str, bytes] = {}
    for language_section, model in zip(sections, models, strict=True):
        contents = dict(zip(TOKENIZER_FILES, (model, *vocabulary_files(model)), strict=True))
        for key, content in contents.items():
            name = artifact_name(language_section.get(key), model, key)
            if name in files:
                name = artifact_name(None, model, key)
            language_section[key] = f"nemo:{name}"
            files[name] = content
    return files


def artifact_name(reference: str | None, model: bytes, key: str) -> str:
    """Return the name of a tokenizer file in the archive.

    Args:
        reference: present value of the setting, kept if it is a valid `nemo:<name>`; None for a new name.
        model: SentencePiece model, whose digest makes a new name unique.
        key: the setting, a key of `TOKENIZER_FILES`.
    """
    match = re.fullmatch(r"nemo:([\w.-]+)", reference or "")
    if match:
        return match[1]
    # names in NeMo's files start with 32 hexadecimal digits
    digest = hashlib.sha256(model + key.encode()).hexdigest()[:32]
    return f"{digest}_{TOKENIZER_FILES[key]}"


def put_pieces(settings: dict[str, Any], pieces: list[str], uses_aux_ctc: bool) -> None:
    """Write the vocabulary wherever the settings repeat it.

    Args:
        settings: the settings to change.
        pieces: the tokens before the blank.
        uses_aux_ctc: the model is a transducer with a CTC head; otherwise the section `aux_ctc` stays as it is.
    """
    nemo_pieces = remove_duplicate_marks(pieces)

    def is_used(path: str) -> bool:
        """Return whether the model has the part that a setting belongs to."""
        return uses_aux_ctc or not path.startswith("aux_ctc.")

    for path in filter(is_used, VOCABULARY_LISTS):
        if isinstance(find_setting(settings, path), (str, list)):
            put_setting(settings, path, nemo_pieces)
    for path in filter(is_used, VOCABULARY_COUNTS):
        if find_setting(settings, path) not in (None, len(nemo_pieces)):
            put_setting(settings, path, len(nemo_pieces))


def put_fields(settings: dict[str, Any], config: Any, extractor: Any) -> None:
    """Write the fields of the configuration and of the feature extractor whose values differ from the settings.

    Args:
        settings: the settings to change; those that agree keep their text, interpolations included.
        config: configuration of the model.
        extractor: its feature extractor.
    """
    resolved = resolve_interpolations(settings)
    for field, owner in fields_with_owners(config, extractor):
        if field.value_from_owner(owner) == field.value_from_settings(resolved):
            continue
        value = field.value_for_nemo(owner, resolved)
        put_setting(settings, field.setting, value)
        for path in field.copies:
            put_setting(settings, path, value, create=False)


def fields_with_owners(config: Any, extractor: Any) -> Iterator[tuple[Field, Any]]:
    """Yield every row of the table of fields with the configuration or feature extractor that has the field."""
    for field in ENCODER_FIELDS:
        yield field, config.encoder_config
    for field in select_model_fields(get_head_type(config), has_ctc_head(config)):
        yield field, config
    for field in EXTRACTOR_FIELDS:
        yield field, extractor


def nemo_state_dict(model: Any, extractor: Any, settings: Settings) -> dict[str, Tensor]:
    """Return the state dict of a model under NeMo's names, with the buffers of NeMo's feature extractor.

    Args:
        model: the model.
        extractor: its feature extractor.
        settings: the settings that are written.
    """
    dropout = find_setting(resolve_interpolations(settings), "joint.jointnet.dropout")
    window = torch.hann_window(extractor.win_length, periodic=False)
    state_dict = dict(zip(FEATURE_BUFFER_KEYS, (window, mel_filters(extractor)), strict=True))
    for name, tensor in model.state_dict().items():
        nemo_name = to_nemo_name(name, is_transducer=hasattr(model, "joint"), has_joint_dropout=bool(dropout))
        state_dict[nemo_name] = with_own_storage(tensor)
    return state_dict


def mel_filters(extractor: Any) -> Tensor:
    """Return the mel filters of a feature extractor, rounded as in NeMo: triangles in float32, then their norm.

    Returns:
        (1, F, n_fft / 2 + 1) float32.
    """
    triangles, norm = compute_mel_triangles(extractor.feature_size, extractor.n_fft, extractor.sampling_rate)
    filters = triangles.astype(np.float32) * norm[:, None]
    return torch.from_numpy(filters.astype(np.float32))[None]


def with_own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU whose storage contains no other values, because `torch.save` writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    fills_storage = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if fills_storage else tensor.clone()


__all__ = ["export_nemo"]

"""Writes `.nemo` files: the way back from configuration fields, weights and tokenizer to what NeMo restores.

Reading, and with it what a setting means, is in `nemo.py` and `nemo_settings.py`.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from ..configuration_parakeet import blank_of, kind_of
from ..feature_extraction_parakeet import mel_triangles
from .archive import SETTINGS, NemoError, write_archive
from .keys import lookup
from .reader import DROPPED_KEYS, NAMES, PIECES, pattern
from .sentencepiece import plain_pieces, sentencepiece_models, vocabulary_files
from .settings import COUNTS, LISTS, Resolver, config_fields, dump_settings, extractor_fields, parse_settings

# field -> where NeMo keeps it: the first place is always written, the others where the file has them
ENCODER_PLACES = {
    "hidden_size": ("encoder.d_model", "decoder.feat_in", "aux_ctc.decoder.feat_in", "joint.jointnet.encoder_hidden",
                    "model_defaults.enc_hidden"),
    "num_hidden_layers": ("encoder.n_layers",),
    "num_attention_heads": ("encoder.n_heads",),
    "intermediate_size": ("encoder.ff_expansion_factor",),
    "attention_bias": ("encoder.use_bias",),
    "conv_kernel_size": ("encoder.conv_kernel_size",),
    "subsampling_factor": ("encoder.subsampling_factor",),
    "subsampling_conv_channels": ("encoder.subsampling_conv_channels",),
    "num_mel_bins": ("encoder.feat_in", "preprocessor.features"),
    "dropout": ("encoder.dropout_pre_encoder",),
    "dropout_positions": ("encoder.dropout_emb",),
    "layerdrop": ("encoder.stochastic_depth_drop_prob",),
    "stochastic_depth_mode": ("encoder.stochastic_depth_mode",),
    "stochastic_depth_start_layer": ("encoder.stochastic_depth_start_layer",),
    "activation_dropout": ("encoder.dropout",),
    "attention_dropout": ("encoder.dropout_att",),
    "max_position_embeddings": ("encoder.pos_emb_max_len",),
    "scale_input": ("encoder.xscaling",),
    "attention_context_style": ("encoder.att_context_style",),
    "self_attention_model": ("encoder.self_attention_model",),
    "global_tokens": ("encoder.global_tokens",),
    "global_tokens_spacing": ("encoder.global_tokens_spacing",),
    "global_attn_separate": ("encoder.global_attn_separate",),
    "conv_norm_type": ("encoder.conv_norm_type",),
    "conv_context_size": ("encoder.conv_context_size",),
    "causal_downsampling": ("encoder.causal_downsampling",),
}  # fmt: skip
EXTRACTOR_PLACES = {
    "feature_size": ("preprocessor.features",),
    "sampling_rate": ("preprocessor.sample_rate", "sample_rate"),
    "n_fft": ("preprocessor.n_fft",),
    "win_length": ("preprocessor.window_size",),
    "preemphasis": ("preprocessor.preemph",),
    "normalize": ("preprocessor.normalize",),
}
PLACES = {
    "spec_augment": ("spec_augment",),
    "segment_separators": ("decoding.segment_seperators",),
    "segment_gap_threshold": ("decoding.segment_gap_threshold",),
    "decoder_hidden_size": ("decoder.prednet.pred_hidden", "joint.jointnet.pred_hidden", "model_defaults.pred_hidden"),
    "num_decoder_layers": ("decoder.prednet.pred_rnn_layers",),
    "decoder_dropout": ("decoder.prednet.dropout",),
    "joint_hidden_size": ("joint.jointnet.joint_hidden", "model_defaults.joint_hidden"),
    "joint_dropout": ("joint.jointnet.dropout",),
    "hidden_act": ("joint.jointnet.activation",),
    "max_symbols_per_step": ("decoding.greedy.max_symbols",),
    "loss_reduction": ("rnnt_reduction",),
    "durations": ("decoding.durations", "loss.tdt_kwargs.durations", "model_defaults.tdt_durations"),
    "loss_sigma": ("loss.tdt_kwargs.sigma",),
    "loss_omega": ("loss.tdt_kwargs.omega",),
    "ctc_loss_weight": ("aux_ctc.ctc_loss_weight",),
}

# what NeMo's encoder always is
FIXED = {"hidden_act": "silu", "subsampling_conv_kernel_size": 3, "subsampling_conv_stride": 2}

logger = logging.get_logger(__name__)

MODULES = "nemo.collections.asr.modules."
MODELS = "nemo.collections.asr.models."


def export_nemo(model: Any, processor: Any, path: str | Path) -> None:
    """Write a `.nemo` file that NeMo restores: settings, weights and tokenizer.

    Settings of the `.nemo` file that a checkpoint came from (`config.nemo_config`) return as they were, unless the
    configuration has changed them since. An existing file is replaced once the new one is complete.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`, on any device.
        processor: its processor.
        path: the file.

    Raises:
        NemoError: NeMo has no place for something of the model or the tokenizer.
    """
    path = Path(path)
    if path.suffix != ".nemo":
        raise NemoError(f"the path must end in .nemo, got {path}: NeMo knows its files by that")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to: create it")
    config = model.config
    check_config(config)
    labels = config.vocab_size - 1
    models = sentencepiece_models(processor.tokenizer, labels)
    settings, files = with_tokenizer(base_settings(config), models)
    put_pieces(settings, processor.tokenizer.convert_ids_to_tokens(range(labels)), getattr(config, "ctc_head", False))
    put_fields(settings, config, processor.feature_extractor)
    files = {SETTINGS: dump_settings(settings), **files}
    write_archive(path, files, nemo_weights(model, processor.feature_extractor, settings))


def check_config(config: Any) -> None:
    """Refuse what NeMo cannot express."""
    kind = kind_of(config)
    if kind not in ("ctc", "rnnt", "tdt"):
        raise NemoError(
            f"a model with a CTC, RNN-T or TDT head is needed, got {config.model_type!r}: export that model"
        )
    blank = blank_of(config)
    if blank != config.vocab_size - 1:
        raise NemoError(
            f"the blank must be the last of {config.vocab_size} tokens, it is {blank}: NeMo has no other place"
        )
    encoder = config.encoder_config
    for field, value in FIXED.items():
        if getattr(encoder, field) != value:
            raise NemoError(f"`encoder_config.{field}` is {getattr(encoder, field)!r}, in NeMo it is always {value!r}")
    if encoder.global_tokens and encoder.global_attn_separate and max(encoder.attention_context_size) < 0:
        raise NemoError(
            "NeMo has global tokens in local attention only, the attention context is unlimited: choose another with "
            "`model.set_attention_context`"
        )
    if encoder.attention_bias != encoder.convolution_bias:
        raise NemoError("`attention_bias` and `convolution_bias` differ, NeMo has one setting for both")
    if encoder.intermediate_size % encoder.hidden_size:
        raise NemoError(
            f"`intermediate_size` is {encoder.intermediate_size}, NeMo needs a multiple of {encoder.hidden_size}"
        )
    if kind != "ctc" and config.hidden_act not in ("relu", "tanh", "sigmoid"):
        raise NemoError(f"`hidden_act` is {config.hidden_act!r}, NeMo's joint network has relu, tanh and sigmoid")


def base_settings(config: Any) -> dict[str, Any]:
    """Return the settings that the checkpoint came with, else those of a new model of its kind."""
    if config.nemo_config is not None:
        return parse_settings(config.nemo_config.encode())
    kind, width = kind_of(config), config.encoder_config.hidden_size
    ctc_decoder = {"_target_": f"{MODULES}ConvASRDecoder", "feat_in": width, "num_classes": -1, "vocabulary": PIECES}
    settings: dict[str, Any] = {
        "sample_rate": 16000,
        "tokenizer": {"dir": "tokenizer", "type": "bpe"},
        "train_ds": None,
        "validation_ds": None,
        "test_ds": None,
        "preprocessor": {
            "_target_": f"{MODULES}AudioToMelSpectrogramPreprocessor",
            "sample_rate": 16000, "normalize": "per_feature", "window_size": 0.025, "window_stride": 0.01,
            "window": "hann", "features": config.encoder_config.num_mel_bins, "n_fft": 512, "log": True,
            "frame_splicing": 1, "dither": 1e-05, "pad_to": 0, "pad_value": 0.0,
        },
        "encoder": {
            "_target_": f"{MODULES}ConformerEncoder",
            "feat_in": config.encoder_config.num_mel_bins, "feat_out": -1, "n_layers": 1, "d_model": width,
            "use_bias": True, "subsampling": "dw_striding", "subsampling_factor": 8, "subsampling_conv_channels": 256,
            "causal_downsampling": False, "ff_expansion_factor": 4, "self_attention_model": "rel_pos", "n_heads": 8,
            "att_context_size": [-1, -1], "att_context_style": "regular", "xscaling": True, "untie_biases": True,
            "pos_emb_max_len": 5000, "conv_kernel_size": 9, "conv_norm_type": "batch_norm", "conv_context_size": None,
            "dropout": 0.1, "dropout_pre_encoder": 0.1, "dropout_emb": 0.0, "dropout_att": 0.1,
        },
        "decoding": {"strategy": "greedy_batch", "greedy": {}},
    }  # fmt: skip
    if kind == "ctc":
        return {**settings, "decoder": ctc_decoder, "target": f"{MODELS}ctc_bpe_models.EncDecCTCModelBPE"}
    settings |= transducer_settings(kind, width)
    if config.ctc_head:
        settings["aux_ctc"] = {"decoder": ctc_decoder, "decoding": {"strategy": "greedy_batch", "greedy": {}}}
        settings["target"] = f"{MODELS}hybrid_rnnt_ctc_bpe_models.EncDecHybridRNNTCTCBPEModel"
    return settings


def transducer_settings(kind: str, width: int) -> dict[str, Any]:
    """Return what a new transducer over an encoder of that width has beside the settings of every model.

    Sizes that are 0 or -1 here are filled in later.
    """
    loss: dict[str, Any] = {"loss_name": "default"}
    decoding: dict[str, Any] = {"strategy": "greedy_batch", "greedy": {"max_symbols": 10}}
    joint: dict[str, Any] = {"joint_hidden": 0, "activation": "relu", "dropout": 0.0, "encoder_hidden": width}
    if kind == "tdt":
        decoding |= {"model_type": "tdt", "durations": [0]}
        loss = {"loss_name": "tdt", "tdt_kwargs": {"durations": [0], "sigma": 0.0, "omega": 0.0, "clamp": -1.0}}
    return {
        # NeMo reads both widths from here as well
        "model_defaults": {"enc_hidden": width, "pred_hidden": 0, "joint_hidden": 0},
        "decoder": {
            "_target_": f"{MODULES}RNNTDecoder",
            "normalization_mode": None,
            "random_state_sampling": False,
            "blank_as_pad": True,
            "prednet": {"pred_hidden": 0, "pred_rnn_layers": 0, "t_max": None, "dropout": 0.0},
            "vocab_size": -1,
        },
        "joint": {
            "_target_": f"{MODULES}RNNTJoint",
            "log_softmax": None,
            "preserve_memory": False,
            "fuse_loss_wer": False,
            "jointnet": {**joint, "pred_hidden": 0},
            "num_classes": -1,
            "num_extra_outputs": 0,
            "vocabulary": PIECES,
        },
        "decoding": decoding,
        "loss": loss,
        "labels": PIECES,
        "target": f"{MODELS}rnnt_bpe_models.EncDecRNNTBPEModel",
    }


def with_tokenizer(settings: dict[str, Any], models: list[bytes]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Add tokenizer files to the settings.

    Args:
        settings: changed in place.
        models: SentencePiece models, one per language.

    Returns:
        The settings, and the files by name.
    """
    section = settings.get("tokenizer") or {}
    langs = section.get("langs") if section.get("type") == "agg" else None
    if langs is None or len(langs) != len(models):
        if len(models) > 1:
            raise NemoError(f"the tokenizer has {len(models)} languages, `tokenizer.langs` must name as many")
        kept = {} if langs is not None else section
        # NeMo asks for `dir` and does not use it
        settings["tokenizer"] = section = {"dir": "tokenizer", **kept, "type": "bpe"}
        langs = {"": section}
    files: dict[str, bytes] = {}
    for part, model in zip(langs.values(), models, strict=True):
        words, scores = vocabulary_files(model)
        contents = {"model_path": ("tokenizer.model", model), "vocab_path": ("vocab.txt", words),
                    "spe_tokenizer_vocab": ("tokenizer.vocab", scores)}  # fmt: skip
        for key, (name, content) in contents.items():
            reference = part.get(key) or ""
            if (
                not reference.startswith("nemo:")
                or not re.fullmatch(r"[\w.-]+", reference[5:])
                or reference[5:] in files
            ):
                # NeMo's names begin with 32 hexadecimal digits
                digest = hashlib.sha256(model + key.encode()).hexdigest()[:32]
                reference = f"nemo:{digest}_{name}"
            part[key] = reference
            files[reference.removeprefix("nemo:")] = content
    return settings, files


def put(settings: dict[str, Any], path: str, value: Any, create: bool = True) -> None:
    """Write a setting by its dotted path; without `create` only where the file has it."""
    *sections, key = path.split(".")
    place = settings
    for section in sections:
        if not isinstance(place.get(section), dict):
            if not create:
                return
            place[section] = {}
        place = place[section]
    if create or key in place:
        place[key] = value


def put_pieces(settings: dict[str, Any], names: list[str], hybrid: bool) -> None:
    """Write the vocabulary wherever the file repeats it; `aux_ctc` is a stub unless the model is a hybrid."""
    plain = plain_pieces(names)
    for path in LISTS:
        if isinstance(lookup(settings, path), (str, list)) and (hybrid or not path.startswith("aux_ctc.")):
            put(settings, path, plain)
    for path in COUNTS:
        if lookup(settings, path) not in (None, len(plain)) and (hybrid or not path.startswith("aux_ctc.")):
            put(settings, path, len(plain))


def put_fields(settings: dict[str, Any], config: Any, extractor: Any) -> None:
    """Write the fields of the configuration that are not what the settings say."""
    kind = kind_of(config)
    resolved = Resolver(settings).visit(settings)
    if kind == "tdt" and lookup(resolved, "joint.num_extra_outputs") != len(config.durations):
        put(settings, "joint.num_extra_outputs", len(config.durations))
        put(settings, "model_defaults.num_tdt_durations", len(config.durations), create=False)
    given = config_fields(resolved, kind, getattr(config, "ctc_head", False))
    read_encoder = given.pop("encoder_config")
    # NeMo keeps the ratio, and so does this comparison
    read_encoder["intermediate_size"] //= read_encoder["hidden_size"] or 1
    put_attention_context(settings, read_encoder, config.encoder_config)
    for tree, source, places in (
        (read_encoder, config.encoder_config, ENCODER_PLACES),
        (given, config, places_of(kind)),
        (extractor_fields(resolved), extractor, EXTRACTOR_PLACES),
    ):
        for field, (first, *others) in places.items():
            if field not in tree:
                continue
            value = own_value(source, field)
            if value == plain_list(tree[field]):
                continue
            value = in_nemo(field, value, resolved)
            put(settings, first, value)
            for path in others:
                put(settings, path, value, create=False)


def put_attention_context(settings: dict[str, Any], read: Mapping[str, Any], encoder: Any) -> None:
    """Write the attention context where it is not what the settings say: the one in use first, as in NeMo."""
    context, contexts = list(encoder.attention_context_size), encoder.attention_context_sizes
    if context == read["attention_context_size"] and contexts == read["attention_context_sizes"]:
        return
    if encoder.attention_context_style == "chunked_limited_with_rc":
        # NeMo does not read the context of this style, and starts with full attention
        if max(context) < 0:
            return
        logger.warning(
            "A .nemo file cannot hold the attention context %s of the style chunked_limited_with_rc: NeMo starts with "
            "full attention, choose the context there again.",
            context,
        )
        return
    others = [other for other in contexts or [] if other != context] if context in (contexts or []) else []
    put(settings, "encoder.att_context_size", [context, *others] if others else context)


def places_of(kind: str) -> dict[str, tuple[str, ...]]:
    """Return `PLACES` with those that depend on the kind of model."""
    ctc = "ctc_reduction" if kind == "ctc" else "aux_ctc.ctc_reduction"
    fastemit = "loss.tdt_kwargs" if kind == "tdt" else "loss.warprnnt_numba_kwargs"
    return {**PLACES, "ctc_loss_reduction": (ctc,), "fastemit_lambda": (f"{fastemit}.fastemit_lambda",)}


def own_value(source: Any, field: str) -> Any:
    """Return a field of a configuration or an extractor in the types of YAML."""
    value = getattr(source, field)
    if field == "joint_hidden_size" and value is None:
        value = source.decoder_hidden_size
    if field == "intermediate_size":
        value //= source.hidden_size
    if field == "stochastic_depth_mode" and value is None:
        # NeMo's nearest to LayerDrop; its default where no block is dropped
        value = "uniform" if source.layerdrop else "linear"
    if field == "self_attention_model" and max(source.attention_context_size) < 0:
        # NeMo has no local attention without a limit; this is the same
        value = "rel_pos"
    if field == "global_tokens" and max(source.attention_context_size) < 0:
        value = 0
    return plain_list(value)


def plain_list(value: Any) -> Any:
    """Return a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def in_nemo(field: str, value: Any, settings: Mapping[str, Any]) -> Any:
    """Return the value of a field as NeMo writes it."""
    if field == "win_length":
        return value / lookup(settings, "preprocessor.sample_rate")
    if field == "normalize" and value is None:
        return "NA"
    if field == "spec_augment" and value:
        target = lookup(settings, "spec_augment._target_") or f"{MODULES}SpectrogramAugmentation"
        return {"_target_": target, **value}
    return value


def nemo_weights(model: Any, extractor: Any, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state dict by NeMo's names, with the buffers of its feature extractor."""
    dropout = lookup(Resolver(settings).visit(dict(settings)), "joint.jointnet.dropout")
    # a hybrid's CTC head has a prefix, because `decoder` is its prediction network
    extra = {"place": "2" if dropout else "1", "ctc": "ctc_" if hasattr(model, "joint") else ""}
    window = torch.hann_window(extractor.win_length, periodic=False)
    state = dict(zip(DROPPED_KEYS, (window, mel_filters(extractor)), strict=True))
    for key, tensor in model.state_dict().items():
        state[nemo_name(key, extra)] = whole(tensor)
    return state


def mel_filters(extractor: Any) -> Tensor:
    """Return the (1, F, n_fft / 2 + 1) mel filters, rounded as NeMo's are: triangles in float32, then their norm."""
    triangles, norm = mel_triangles(extractor.feature_size, extractor.n_fft, extractor.sampling_rate)
    return torch.from_numpy((triangles.astype(np.float32) * norm[:, None]).astype(np.float32))[None]


def nemo_name(key: str, extra: Mapping[str, str]) -> str:
    """Return NeMo's name of one of our weights."""
    for theirs, ours in NAMES:
        match = re.fullmatch(pattern(ours), key)
        if match:
            return theirs.format(**match.groupdict(), **extra)
    raise NemoError(f"NeMo has no place for the weight {key!r}: merge adapters (PEFT: `merge_and_unload()`) first")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU whose storage holds nothing else, as torch writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    own = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if own else tensor.clone()


__all__ = ["export_nemo"]

"""Reads `.nemo` files: builds models, extractors and tokenizers, and places every weight.

Files are found by `hub.py`. Settings are for `nemo_settings.py`, SentencePiece models for `subwords.py`, the way back
for `nemo_export.py`.
"""

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers.utils import logging

from ..feature_extraction_parakeet import ParakeetFeatureExtractor
from ..modeling_parakeet import ParakeetPreTrainedModel
from ..processing_parakeet import ParakeetProcessor
from ..tokenization_parakeet import ParakeetTokenizer
from .archive import SETTINGS, Archive, NemoError
from .hub import MODELS, find_checkpoint, load_folder
from .keys import ELSE, MULTI_TALKER, PROMPT, SECTIONS, check_section, check_settings
from .sentencepiece import build_tokenizer, plain_pieces
from .settings import (
    LISTS,
    Resolver,
    check_vocabulary,
    config_fields,
    dump_settings,
    extractor_fields,
    has_ctc_head,
    head_kind,
    parse_settings,
    with_sizes,
)

logger = logging.get_logger(__name__)

# NeMo's name of a weight and ours. Placeholders mean the same on both sides. Only NeMo has {ctc}, which is `ctc_` in a
# hybrid, and {place}, which counts a dropout module that is there only when its probability is above 0
NAMES = (
    ("encoder.pre_encode.conv.{n}.{w}", "encoder.subsampling.layers.{n}.{w}"),
    ("encoder.pre_encode.out.{w}", "encoder.subsampling.linear.{w}"),
    ("encoder.layers.{n}.norm_{name}.{w}", "encoder.layers.{n}.norm_{name}.{w}"),
    ("encoder.layers.{n}.feed_forward{i}.linear{j}.{w}", "encoder.layers.{n}.feed_forward{i}.linear{j}.{w}"),
    ("encoder.layers.{n}.self_attn.linear_{qkv}.{w}", "encoder.layers.{n}.self_attn.{qkv}_proj.{w}"),
    ("encoder.layers.{n}.self_attn.global_{qkv}.{w}", "encoder.layers.{n}.self_attn.global_{qkv}_proj.{w}"),
    ("encoder.layers.{n}.self_attn.linear_out.{w}", "encoder.layers.{n}.self_attn.o_proj.{w}"),
    ("encoder.layers.{n}.self_attn.linear_pos.weight", "encoder.layers.{n}.self_attn.relative_k_proj.weight"),
    ("encoder.layers.{n}.self_attn.pos_bias_{uv}", "encoder.layers.{n}.self_attn.bias_{uv}"),
    ("encoder.layers.{n}.conv.{point}_conv{i}.{w}", "encoder.layers.{n}.conv.{point}_conv{i}.{w}"),
    ("encoder.layers.{n}.conv.depthwise_conv.{w}", "encoder.layers.{n}.conv.depthwise_conv.{w}"),
    ("encoder.layers.{n}.conv.batch_norm.{name}", "encoder.layers.{n}.conv.norm.{name}"),
    ("decoder.prediction.embed.weight", "decoder.embedding.weight"),
    ("decoder.prediction.dec_rnn.lstm.{name}", "decoder.lstm.{name}"),
    ("joint.enc.{w}", "encoder_projector.{w}"),
    ("joint.pred.{w}", "decoder.decoder_projector.{w}"),
    ("joint.joint_net.{place}.{w}", "joint.head.{w}"),
    ("{ctc}decoder.decoder_layers.0.{w}", "ctc_head.{w}"),
)
PLACEHOLDERS = {"n": r"\d+", "w": "weight|bias", "name": r"\w+", "i": "[12]", "j": "[12]", "qkv": "[qkv]", "uv": "[uv]",
                "point": "pointwise", "place": "[12]", "ctc": "(?:ctc_)?"}  # fmt: skip

# buffers of the feature extractor, recomputed here
DROPPED_KEYS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")

# start of a weight's name -> the model that it belongs to
OTHER_WEIGHTS = {"spk_kernels.": MULTI_TALKER, "bg_spk_kernels.": MULTI_TALKER, "prompt_kernel.": PROMPT}

# stands in `config.nemo_config` for a list of the tokenizer's pieces
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
    """Read a `.nemo` file without NeMo.

    Weights are private views of the mapped file: they are read when they are first used, and processes that load the
    same file share them. A gzip archive is unpacked into memory.

    Args:
        path: a plain or gzip tar with `model_config.yaml`, `model_weights.ckpt` and the tokenizer; or a Hub id
            `org/name` or a folder with such a file. One that holds safetensors is loaded by `from_pretrained`.
        dtype: of the weights; default as in the file.
        revision: branch, tag or commit of a Hub repository.
        token: as in `from_pretrained`.
        cache_dir: as in `from_pretrained`.
        local_files_only: use only what is in the cache.

    Returns:
        The model in eval mode (`ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; a hybrid is one of the last two
        with a CTC head), and its processor.

    Raises:
        FileNotFoundError: there is no such file.
        NemoError: the file is damaged, or holds a setting or weight that is not implemented.
        OSError: the Hub refuses, or cannot be reached.
    """
    hub = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    found = find_checkpoint(path, **hub)
    if not found.is_file():
        return load_folder(found, dtype=dtype, **hub)
    return load_archive(Archive(found), dtype)


def load_archive(
    archive: Archive, dtype: torch.dtype | None = None
) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Build model and processor from an open archive.

    Raises:
        NemoError: the file is damaged, or holds a setting or weight that is not implemented.
    """
    path = archive.path
    try:
        return read_archive(archive, dtype)
    except KeyError as error:
        raise NemoError(f"{SETTINGS} of {path} lacks the setting {error}") from error
    except NemoError as error:
        raise NemoError(f"{error} (in {path})" if path.name not in str(error) else str(error)) from error
    except (StrictDataclassError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise NemoError(f"a setting in {SETTINGS} of {path} has no valid value: {error}") from error


def read_archive(archive: Archive, dtype: torch.dtype | None) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Do what `load_archive` does; what goes wrong is raised as it is."""
    raw = parse_settings(archive.read(SETTINGS))
    state = archive.weights()
    settings = Resolver(raw).visit(raw)
    kind = head_kind(settings)
    hybrid = kind != "ctc" and has_ctc_head(settings, state)
    unknown = check_settings(settings, is_transducer=kind != "ctc", has_ctc_head=hybrid)
    if unknown:
        logger.warning(
            "%s has settings that are not known here. They cannot change inference and are ignored: %s",
            archive.path,
            ", ".join(unknown),
        )
    settings = with_sizes(settings, {key: tensor.shape for key, tensor in state.items()})
    tokenizer = read_tokenizer(settings, archive.artifact, kind)
    labels = len(tokenizer) - 1
    check_vocabulary(settings, labels)
    config = MODELS[kind].config_class(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        nemo_config=without_pieces(raw, tokenizer.convert_ids_to_tokens(range(labels))),
        **({} if kind == "ctc" else {"blank_token_id": labels, "forced_blanks": True}),
        **config_fields(settings, kind, hybrid),
    )
    try:
        with torch.device("meta"):
            model = MODELS[kind](config)
    except RuntimeError as error:
        raise NemoError(f"a size in {SETTINGS} is too large for any model: {error}") from error
    load_weights(model, state, archive, dtype)
    # after the weights, whose shapes bound the sizes
    extractor = ParakeetFeatureExtractor(**extractor_fields(settings))
    return model.eval(), ParakeetProcessor(extractor, tokenizer, decoder_type=kind)


def read_tokenizer(settings: Mapping[str, Any], artifact: Callable[[str], bytes], kind: str) -> ParakeetTokenizer:
    """Convert the SentencePiece model, or those of an aggregate.

    Args:
        settings: the resolved settings.
        artifact: returns the file that a value of the YAML refers to.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.
    """
    section = settings["tokenizer"]
    parts = {"": section}
    if section["type"].lower() == "agg":
        parts = section.get("langs") or {}
        for lang, part in parts.items():
            check_section(part, f"tokenizer.langs.{lang}", SECTIONS["tokenizer"])
    if not parts:
        raise NemoError("`tokenizer.langs` must name at least one language, it names none: save the file again")
    return build_tokenizer([artifact(part["model_path"]) for part in parts.values()], kind)


def without_pieces(raw: Mapping[str, Any], names: list[str]) -> str:
    """Return the YAML for `config.nemo_config` without the tokenizer's pieces; as text, because JSON would sort it."""
    plain = plain_pieces(names)

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: visit(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        return PIECES if path in LISTS and value == plain else value

    return dump_settings(visit(raw, "")).decode()


def load_weights(
    model: ParakeetPreTrainedModel,
    state: Mapping[str, Tensor],
    archive: Archive,
    dtype: torch.dtype | None = None,
) -> None:
    """Move NeMo's weights into a model on the meta device; every key must find its place, and every parameter a key.

    Args:
        model: the model.
        state: weights of `archive`.
        archive: where the memory of weights goes back to once they are checked.
        dtype: of the model; default that of each weight.
    """
    renamed = {rename(key): tensor for key, tensor in state.items() if key not in DROPPED_KEYS}
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or unexpected:
        raise NemoError(f"the weights do not fit the settings: missing {missing[:5]}, left over {unexpected[:5]}")
    shapes = [
        f"{k}: {list(renamed[k].shape)}, not {list(v.shape)}" for k, v in own.items() if renamed[k].shape != v.shape
    ]
    if shapes:
        raise NemoError(f"the weights do not fit the settings: {'; '.join(shapes[:5])}")
    places: set[int] = set()
    for key, tensor in renamed.items():
        if tensor.is_floating_point() != own[key].is_floating_point():
            raise NemoError(f"{key!r} is {tensor.dtype}: quantised weights are not implemented, save them in float32")
        check_finite(key, tensor)
        # weights that NeMo ties share their bytes; here each is on its own
        shared = tensor.data_ptr() in places
        places.add(tensor.data_ptr())
        cast = tensor.to(dtype if dtype and tensor.is_floating_point() else tensor.dtype, copy=shared)
        archive.release(tensor)
        renamed[key] = cast
    model.load_state_dict(renamed, assign=True)
    materialise_buffers(model)
    if dtype is not None:
        model.config.dtype = dtype


def check_finite(key: str, tensor: Tensor) -> None:
    """Refuse weights that are not numbers."""
    if tensor.is_floating_point() and not all(bool(bound.isfinite()) for bound in tensor.aminmax()):
        raise NemoError(f"the weight {key!r} holds NaN or infinity: the file is damaged, copy or save it again")


def materialise_buffers(model: ParakeetPreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds."""
    for module in model.modules():
        lost = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for name in lost:
            setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
        if lost:
            model._init_weights(module)


def rename(key: str) -> str:
    """Return our name of one of NeMo's weights.

    Raises:
        NemoError: the weight belongs to something that is not implemented.
    """
    for theirs, ours in NAMES:
        match = re.fullmatch(pattern(theirs), key)
        if match:
            return ours.format(**match.groupdict())
    for start, kind in OTHER_WEIGHTS.items():
        if key.startswith(start):
            raise NemoError(f"the weight {key!r} belongs to {kind}: {ELSE}")
    advice = "merge or remove the adapters in NeMo and save again" if "adapter" in key else ELSE
    raise NemoError(f"the weight {key!r} belongs to nothing that is implemented here: {advice}")


@cache
def pattern(template: str) -> str:
    """Return the regular expression of a template of `NAMES`."""
    parts = re.split(r"\{(\w+)\}", template)
    return "".join(f"(?P<{part}>{PLACEHOLDERS[part]})" if i % 2 else re.escape(part) for i, part in enumerate(parts))


__all__ = ["NemoError", "load_nemo"]

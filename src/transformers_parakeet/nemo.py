"""Reads `.nemo` files: which weight and which setting becomes what, and what is refused.

Builds models, extractors and tokenizers of this package; training and running them is for others.
"""

import io
import pickle
import re
import struct
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers
from tokenizers.models import BPE, Unigram
from torch import Tensor
from transformers import PreTrainedConfig

from .configuration_parakeet import HOP_LENGTH, ParakeetCTCConfig, ParakeetRNNTConfig, ParakeetTDTConfig
from .feature_extraction_parakeet import LOG_ZERO_GUARD, ParakeetFeatureExtractor
from .losses import REDUCTIONS
from .modeling_parakeet import ParakeetForCTC, ParakeetForRNNT, ParakeetForTDT, ParakeetPreTrainedModel
from .processing_parakeet import ParakeetProcessor
from .tokenization_parakeet import WORD_START, ParakeetTokenizer


class NemoError(ValueError):
    """A `.nemo` file that cannot be read, or holds something that is not implemented."""


# NeMo's key -> ours, tried in order; `\1` is what the group matched
KEYS = (
    (r"encoder\.pre_encode\.conv\.(\d+)\.(weight|bias)", r"encoder.subsampling.layers.\1.\2"),
    (r"encoder\.pre_encode\.out\.(weight|bias)", r"encoder.subsampling.linear.\1"),
    (r"(encoder\.layers\.\d+\.norm_\w+\.(?:weight|bias))", r"\1"),
    (r"(encoder\.layers\.\d+\.feed_forward[12]\.linear[12]\.(?:weight|bias))", r"\1"),
    (r"(encoder\.layers\.\d+\.self_attn)\.linear_([qkv])\.(weight|bias)", r"\1.\2_proj.\3"),
    (r"(encoder\.layers\.\d+\.self_attn)\.linear_out\.(weight|bias)", r"\1.o_proj.\2"),
    (r"(encoder\.layers\.\d+\.self_attn)\.linear_pos\.weight", r"\1.relative_k_proj.weight"),
    (r"(encoder\.layers\.\d+\.self_attn)\.pos_bias_([uv])", r"\1.bias_\2"),
    (r"(encoder\.layers\.\d+\.conv\.(?:pointwise_conv[12]|depthwise_conv)\.(?:weight|bias))", r"\1"),
    (r"(encoder\.layers\.\d+\.conv)\.batch_norm\.(\w+)", r"\1.norm.\2"),
    (r"decoder\.prediction\.embed\.weight", r"decoder.embedding.weight"),
    (r"decoder\.prediction\.dec_rnn\.lstm\.(\w+)", r"decoder.lstm.\1"),
    (r"joint\.enc\.(weight|bias)", r"encoder_projector.\1"),
    (r"joint\.pred\.(weight|bias)", r"decoder.decoder_projector.\1"),
    # the index counts a dropout module, which is there only when its probability is above 0
    (r"joint\.joint_net\.[12]\.(weight|bias)", r"joint.head.\1"),
    (r"(?:ctc_)?decoder\.decoder_layers\.0\.(weight|bias)", r"ctc_head.\1"),
)

# buffers of the feature extractor, recomputed here
DROPPED_KEYS = ("preprocessor.featurizer.window", "preprocessor.featurizer.fb")

# section -> setting -> the values that are implemented
ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "encoder": {
        "subsampling": ("dw_striding",),
        "causal_downsampling": (False,),
        "self_attention_model": ("rel_pos",),
        "att_context_size": (None, [-1, -1], [[-1, -1]]),
        "att_context_style": ("regular",),
        "conv_norm_type": ("batch_norm",),
        "conv_context_size": (None,),
        "feat_out": (-1, 0),
        "reduction": (None,),
    },
    "preprocessor": {
        "sample_rate": (16000,),
        "window": ("hann",),
        "normalize": ("per_feature",),
        "mag_power": (2.0,),
        "mel_norm": ("slaney",),
        "lowfreq": (0,),
        "highfreq": (None, 8000),
        "log": (True,),
        "log_zero_guard_type": ("add",),
        "log_zero_guard_value": (LOG_ZERO_GUARD,),
        "frame_splicing": (1,),
        "nb_augmentation_prob": (0.0,),
        "exact_pad": (False,),
        "use_torchaudio": (False,),
    },
    "decoder": {"normalization_mode": (None,), "blank_as_pad": (True,), "random_state_sampling": (False,)},
    "decoder.prednet": {"rnn_hidden_size": (-1, 0, None), "forget_gate_bias": (1.0, None), "norm": (None,)},
    "joint": {"log_softmax": (None,), "masking_prob": (-1, None)},
    "joint.jointnet": {"activation": ("relu", "tanh", "sigmoid")},
    "decoding": {"big_blank_durations": (None, [])},
    "decoding.greedy": {},
    "loss": {"loss_name": ("default", "warprnnt", "warprnnt_numba", "pytorch", "tdt", "tdt_pytorch")},
    "aux_ctc": {},
    "aux_ctc.decoder": {},
    "": {
        "rnnt_reduction": (None, *REDUCTIONS),
        "ctc_reduction": (None, *REDUCTIONS),
    },
}

# settings that do not change what is computed here, or are read below; `""` is the root of the file
KNOWN: dict[str, str] = {
    "encoder": (
        "_target_ att_chunk_context_size att_context_probs conv_kernel_size d_model dropout dropout_att "
        "dropout_emb dropout_pre_encoder feat_in ff_expansion_factor global_attn_separate global_tokens "
        "global_tokens_spacing n_heads n_layers pos_emb_max_len reduction_factor reduction_position "
        "stochastic_depth_drop_prob stochastic_depth_mode stochastic_depth_start_layer "
        "subsampling_conv_channels subsampling_conv_chunking_factor subsampling_factor sync_max_audio_length "
        "untie_biases use_bias use_pytorch_sdpa use_pytorch_sdpa_backends xscaling"
    ),
    "preprocessor": (
        "_target_ dither features mel_norm n_fft n_window_size n_window_stride nb_max_freq pad_to pad_value "
        "preemph rng stft_conv stft_exact_pad window_size window_stride"
    ),
    "decoder": "_target_ add_blank feat_in init_mode num_classes prednet vocab_size vocabulary",
    "decoder.prednet": ("dropout hidden_hidden_bias_scale pred_hidden pred_rnn_layers t_max weights_init_scale"),
    "joint": (
        "_target_ experimental_fuse_loss_wer fuse_loss_wer fused_batch_size jointnet num_classes "
        "num_extra_outputs preserve_memory vocabulary"
    ),
    "joint.jointnet": "dropout encoder_hidden joint_hidden pred_hidden",
    "decoding": (
        "batch_dim_index beam compute_hypothesis_token_set compute_langs compute_timestamps confidence_cfg "
        "ctc_timestamp_type durations fused_batch_size greedy model_type preserve_alignments "
        "rnnt_timestamp_type segment_gap_threshold segment_seperators strategy tdt_include_duration "
        "tdt_include_token_duration temperature word_seperator"
    ),
    "decoding.greedy": (
        "allow_cuda_graphs boosting_tree boosting_tree_alpha compute_timestamps confidence_method_cfg "
        "enable_per_stream_biasing fusion_models fusion_models_alpha include_duration loop_labels "
        "max_batch_size max_symbols max_symbols_per_step ngram_lm_alpha ngram_lm_model preserve_alignments "
        "preserve_frame_confidence preserve_step_confidence tdt_include_duration_confidence "
        "use_cuda_graph_decoder"
    ),
    "loss": "_target_ tdt_kwargs warprnnt_numba_kwargs",
    "aux_ctc": "ctc_loss_weight ctc_reduction decoder decoding use_cer",
    "aux_ctc.decoder": "_target_ add_blank feat_in init_mode num_classes vocabulary",
    "": (
        "aux_ctc compute_eval_loss decoder decoding encoder interctc joint labels log_prediction loss "
        "model_defaults name nemo_version optim preprocessor restore_timestamps sample_rate skip_nan_grad "
        "spec_augment target test_ds tokenizer train_ds use_cer validation_ds variational_noise"
    ),
}

HEADS: dict[str, tuple[type[PreTrainedConfig], type[ParakeetPreTrainedModel]]] = {
    "ctc": (ParakeetCTCConfig, ParakeetForCTC),
    "rnnt": (ParakeetRNNTConfig, ParakeetForRNNT),
    "tdt": (ParakeetTDTConfig, ParakeetForTDT),
}

# marks the pieces of a second language that the first one has, too; a private-use character
DUPLICATE = "\ue000"


def load_nemo(path: str | Path) -> tuple[ParakeetPreTrainedModel, ParakeetProcessor]:
    """Read a `.nemo` file without NeMo.

    Args:
        path: a plain or gzip tar with `model_config.yaml`, `model_weights.ckpt` and the tokenizer.

    Returns:
        The model in eval mode (`ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; a hybrid is one of the last two
        with a CTC head), and its processor.

    Raises:
        FileNotFoundError: there is no such file.
        NemoError: the file is damaged, or holds a setting or weight that is not implemented.
    """
    with Archive(Path(path)) as archive:
        settings = archive.settings()
        try:
            kind = head_kind(check_section(settings, ""))
            tokenizer = build_tokenizer(settings, archive.artifact, kind)
            model = HEADS[kind][1](build_config(settings, kind, tokenizer))
            extractor = build_extractor(settings)
        except KeyError as error:
            raise NemoError(f"model_config.yaml of {path} lacks the setting {error}") from error
        except StrictDataclassError as error:
            raise NemoError(f"a setting in model_config.yaml of {path} has no valid value: {error}") from error
        load_weights(model, archive.weights())
    return model.eval(), ParakeetProcessor(extractor, tokenizer, decoder_type=kind)


class Archive:
    """The members of a `.nemo` file, read by name into memory; nothing is extracted."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        self.path = path
        try:
            self.tar = tarfile.open(path, "r:*")  # noqa: SIM115  # closed by __exit__
            self.members = {m.name.removeprefix("./"): m for m in self.tar.getmembers() if m.isfile()}
        except (tarfile.TarError, EOFError, OSError) as error:
            raise NemoError(f"{path} is not a readable .nemo archive (plain or gzip tar): {error}") from error

    def __enter__(self) -> "Archive":
        return self

    def __exit__(self, *exception: object) -> None:
        self.tar.close()

    def read(self, name: str) -> bytes:
        """Return the content of a member."""
        if name not in self.members:
            raise NemoError(
                f"{self.path} has no member {name!r}; it holds {', '.join(sorted(self.members)) or 'nothing'}"
            )
        file = self.tar.extractfile(self.members[name])
        assert file is not None
        return file.read()

    def settings(self) -> dict[str, Any]:
        """Return the model section of the YAML file."""
        try:
            settings = yaml.safe_load(self.read("model_config.yaml"))
        except yaml.YAMLError as error:
            raise NemoError(f"model_config.yaml of {self.path} is no YAML: {error}") from error
        if not isinstance(settings, dict):
            raise NemoError(
                f"model_config.yaml of {self.path} must hold settings by name, it holds {type(settings).__name__}"
            )
        return settings.get("model", settings) if "encoder" not in settings else settings

    def artifact(self, reference: str) -> bytes:
        """Return the file that a YAML value such as `nemo:<hash>_tokenizer.model` refers to."""
        return self.read(reference.removeprefix("nemo:"))

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict."""
        content = io.BytesIO(self.read("model_weights.ckpt"))
        try:
            return dict(torch.load(content, map_location="cpu", weights_only=True))
        except (RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError, struct.error) as error:
            raise NemoError(f"model_weights.ckpt of {self.path} holds no weights: {error}") from error


def head_kind(settings: Mapping[str, Any]) -> str:
    """Tell CTC, RNN-T and TDT apart; the class of a file does not say which transducer it is."""
    if "joint" not in settings:
        return "ctc"
    decoding = settings.get("decoding") or {}
    loss = (settings.get("loss") or {}).get("loss_name")
    is_tdt = bool(decoding.get("durations")) or decoding.get("model_type") == "tdt" or loss == "tdt"
    return "tdt" if is_tdt or settings["joint"].get("num_extra_outputs", 0) else "rnnt"


def check_section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a section of the YAML, `""` for its root, after refusing what is not implemented in it."""
    section: Any = settings
    for part in filter(None, name.split(".")):
        section = (section or {}).get(part)
    if not isinstance(section, dict):
        raise NemoError(f"the file has no section `{name}`")
    for key, value in section.items():
        if isinstance(value, str) and "${" in value:
            raise NemoError(f"`{name}.{key}` is {value!r}: resolve the interpolation in model_config.yaml first")
        allowed = ONLY[name].get(key)
        if allowed is not None and value not in allowed:
            raise NemoError(f"`{name}.{key}` is {value!r}, implemented is only {' or '.join(map(repr, allowed))}")
        if allowed is None and key not in KNOWN[name].split():
            raise NemoError(f"`{name}.{key}` (value {value!r}) is not a setting that is known here")
    return section


def optional_section(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a checked section, or nothing where the file has none."""
    section: Any = settings
    for part in name.split("."):
        section = (section or {}).get(part)
    return check_section(settings, name) if section else {}


def encoder_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the encoder section."""
    encoder = check_section(settings, "encoder")
    width, channels = encoder["d_model"], encoder.get("subsampling_conv_channels", -1)
    dropout = encoder.get("dropout", 0.1)
    return {
        "hidden_size": width,
        "num_hidden_layers": encoder["n_layers"],
        "num_attention_heads": encoder.get("n_heads", 4),
        "intermediate_size": width * encoder.get("ff_expansion_factor", 4),
        "attention_bias": encoder.get("use_bias", True),
        "convolution_bias": encoder.get("use_bias", True),
        "conv_kernel_size": encoder.get("conv_kernel_size", 31),
        "subsampling_factor": encoder.get("subsampling_factor", 4),
        "subsampling_conv_channels": width if channels == -1 else channels,
        "num_mel_bins": encoder["feat_in"],
        "dropout": encoder.get("dropout_pre_encoder", dropout),
        "dropout_positions": encoder.get("dropout_emb", dropout),
        "layerdrop": encoder.get("stochastic_depth_drop_prob", 0.0),
        "activation_dropout": dropout,
        "attention_dropout": encoder.get("dropout_att", dropout),
        "max_position_embeddings": encoder.get("pos_emb_max_len", 5000),
        "scale_input": encoder.get("xscaling", True),
    }


def shared_fields(settings: Mapping[str, Any], decoding: Mapping[str, Any]) -> dict[str, Any]:
    """Translate what every head has: augmentation, and how segments are cut."""
    augment = settings.get("spec_augment")
    return {
        "encoder_config": encoder_fields(settings),
        "spec_augment": {k: v for k, v in augment.items() if k != "_target_"} if augment else None,
        # NeMo spells it so
        "segment_separators": list(decoding.get("segment_seperators") or (".", "?", "!")),
        "segment_gap_threshold": decoding.get("segment_gap_threshold"),
    }


def build_config(settings: Mapping[str, Any], kind: str, tokenizer: ParakeetTokenizer) -> PreTrainedConfig:
    """Translate the settings to a configuration."""
    vocab_size = len(tokenizer)
    decoding = optional_section(settings, "decoding")
    if kind == "ctc":
        check_section(settings, "decoder")
        return ParakeetCTCConfig(
            vocab_size=vocab_size,
            pad_token_id=tokenizer.pad_token_id,
            ctc_loss_reduction=settings.get("ctc_reduction", "mean_batch"),
            **shared_fields(settings, decoding),
        )
    fields = {**shared_fields(settings, decoding), **transducer_fields(settings, kind), **hybrid_fields(settings)}
    return HEADS[kind][0](
        vocab_size=vocab_size,
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=vocab_size - 1,
        forced_blanks=True,
        **fields,
    )


def transducer_fields(settings: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Translate prediction network, joint, decoding and loss."""
    check_section(settings, "decoder")
    check_section(settings, "joint")
    prediction = check_section(settings, "decoder.prednet")
    joint = check_section(settings, "joint.jointnet")
    decoding, greedy = optional_section(settings, "decoding"), optional_section(settings, "decoding.greedy")
    loss = optional_section(settings, "loss")
    fields = {
        "decoder_hidden_size": prediction["pred_hidden"],
        "num_decoder_layers": prediction.get("pred_rnn_layers", 1),
        "decoder_dropout": prediction.get("dropout") or 0.0,
        "joint_hidden_size": joint["joint_hidden"],
        "joint_dropout": joint.get("dropout") or 0.0,
        "hidden_act": joint.get("activation", "relu").lower(),
        "max_symbols_per_step": greedy.get("max_symbols") or greedy.get("max_symbols_per_step") or 10,
        "loss_reduction": settings.get("rnnt_reduction") or "mean_batch",
        "fastemit_lambda": (loss.get("warprnnt_numba_kwargs") or {}).get("fastemit_lambda", 0.0),
    }
    if kind == "tdt":
        options = loss.get("tdt_kwargs") or {}
        fields["durations"] = list(decoding.get("durations") or options["durations"])
        fields["loss_sigma"] = options.get("sigma", 0.0)
        fields["loss_omega"] = options.get("omega", 0.0)
        fields["fastemit_lambda"] = options.get("fastemit_lambda", 0.0)
    return fields


def hybrid_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the section of a second, CTC head."""
    aux = optional_section(settings, "aux_ctc")
    if not aux:
        return {}
    check_section(settings, "aux_ctc.decoder")
    return {
        "ctc_head": True,
        "ctc_loss_weight": aux.get("ctc_loss_weight", 0.3),
        "ctc_loss_reduction": aux.get("ctc_reduction") or "mean_batch",
    }


def build_extractor(settings: Mapping[str, Any]) -> ParakeetFeatureExtractor:
    """Translate the preprocessor section."""
    section = check_section(settings, "preprocessor")
    rate = section.get("sample_rate", 16000)
    hop = int(section.get("window_stride", 0.01) * rate)
    if hop != HOP_LENGTH:
        raise NemoError(f"`preprocessor.window_stride` gives {hop} samples, implemented are only {HOP_LENGTH}")
    window = int(section.get("window_size", 0.02) * rate)
    return ParakeetFeatureExtractor(
        feature_size=section.get("features", 64),
        sampling_rate=rate,
        hop_length=hop,
        n_fft=section.get("n_fft") or 1 << (window - 1).bit_length(),
        win_length=window,
        preemphasis=section.get("preemph", 0.97),
    )


def load_weights(model: ParakeetPreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Load a NeMo state dict; every key must find its place, and every parameter a key."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key not in DROPPED_KEYS:
            renamed[rename(key)] = tensor
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - renamed.keys()), sorted(renamed.keys() - own.keys())
    if missing or unexpected:
        raise NemoError(f"the weights do not fit the settings: missing {missing[:5]}, left over {unexpected[:5]}")
    shapes = [
        f"{k}: {list(renamed[k].shape)}, not {list(v.shape)}" for k, v in own.items() if renamed[k].shape != v.shape
    ]
    if shapes:
        raise NemoError(f"the weights do not fit the settings: {'; '.join(shapes[:5])}")
    model.load_state_dict(renamed)


def rename(key: str) -> str:
    """Return our name of one of NeMo's weights.

    Raises:
        NemoError: the weight belongs to something that is not implemented.
    """
    for pattern, ours in KEYS:
        match = re.fullmatch(pattern, key)
        if match:
            return match.expand(ours)
    raise NemoError(f"the weight {key!r} belongs to nothing that is implemented here")


def build_tokenizer(settings: Mapping[str, Any], artifact: Callable[[str], bytes], kind: str) -> ParakeetTokenizer:
    """Convert the SentencePiece model, or those of an aggregate, and append the blank.

    An aggregate encodes with its first language; it decodes all of them.
    """
    section = settings.get("tokenizer") or {}
    if section.get("type") == "agg":
        sections = list(section["langs"].values())
    elif section.get("type") == "bpe":
        sections = [section]
    else:
        raise NemoError(f"`tokenizer.type` is {section.get('type')!r}, implemented are only 'bpe' and 'agg'")
    protos = [parse_sentencepiece(artifact(part["model_path"])) for part in sections]
    backend = sentencepiece_backend(protos[0], [piece.piece for proto in protos[1:] for piece in proto.pieces])
    blank = "<pad>" if kind == "ctc" and backend.token_to_id("<pad>") is None else "<blank>"
    backend.add_special_tokens([AddedToken(blank, special=True, normalized=False)])
    pad = "<pad>" if kind != "ctc" and backend.token_to_id("<pad>") is not None else blank
    unk = protos[0].trainer_spec.unk_piece
    return ParakeetTokenizer(tokenizer_object=backend, unk_token=unk, pad_token=pad, clean_up_tokenization_spaces=False)


def parse_sentencepiece(content: bytes) -> Any:
    """Return the protocol buffer of a SentencePiece model."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise NemoError(f"the tokenizer is not a SentencePiece model: {error}") from error
    return proto


def sentencepiece_backend(proto: Any, more: list[str]) -> Tokenizer:
    """Build a tokenizer that splits as SentencePiece does.

    Args:
        proto: the model.
        more: pieces of further languages, appended for decoding.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    seen = {piece for piece, _ in pieces}
    for piece in more:
        while piece in seen:
            piece += DUPLICATE
        seen.add(piece)
        pieces.append((piece, float("-inf")))
    own = len(proto.pieces)
    unknown = proto.trainer_spec.unk_piece
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        merges = generate_merges({p: vocabulary[p] for p, _ in pieces[:own]}, pieces[:own])
        model: BPE | Unigram = BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback
        )
    else:
        model = Unigram(pieces, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = sentencepiece_normalizer(proto.normalizer_spec)
    byte_steps = [decoders.ByteFallback(), decoders.Fuse()] if proto.trainer_spec.byte_fallback else []
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(DUPLICATE, ""),
            *byte_steps,
            decoders.Metaspace(replacement=WORD_START, prepend_scheme="always"),
        ]
    )
    # single characters are never split, and an added token would cut the text around it
    user_defined = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.USER_DEFINED) and len(p.piece) > 1]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in user_defined])
    return tokenizer


def sentencepiece_normalizer(spec: Any) -> Any:
    """Build what SentencePiece does before it splits: its table, its spaces, the word start before the first word."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(r"\A(?=[\s\S])"), WORD_START))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])


__all__ = ["NemoError", "load_nemo"]

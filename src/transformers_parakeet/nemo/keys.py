"""The sections of a `.nemo` file's settings: which keys are read, which are ignored, and which are refused.

Keys that become fields of our configuration come from the table in `fields.py`. `conversion/settings_table.py` writes
the sections into docs/conversion.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..feature_extraction_parakeet import LOG_ZERO_GUARD
from .archive import SETTINGS, NemoError
from .fields import (
    ENCODER_FIELDS,
    EXTRACTOR_FIELDS,
    MODEL_FIELDS,
    MULTI_TALKER,
    NEEDS_NEMO,
    PROMPT,
    VOCABULARY_COUNTS,
    VOCABULARY_LISTS,
)
from .settings import Settings, find_setting


@dataclass(frozen=True)
class Section:
    """The keys of one section of the settings.

    Args:
        read: keys that are read, with their implemented values; an empty tuple means that every value is accepted.
        ignored: keys that cannot change the result of inference.
        classes: implemented values of `_target_`, without their module; empty if the section does not choose a class.
        refused: keys of models that are not implemented, with a description of these models.
        strict: refuse unknown keys and values; otherwise they are ignored, and one warning names them.
    """

    read: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True


def table_keys(section_name: str) -> dict[str, tuple[Any, ...]]:
    """Return the keys of a section that the table of fields reads, with their implemented values.

    A key that is a section itself is included: `encoder.d_model` gives the key `encoder` of the root.
    """
    allowed: dict[str, tuple[Any, ...]] = dict.fromkeys((*VOCABULARY_COUNTS, *VOCABULARY_LISTS), ())
    for row in (*ENCODER_FIELDS, *MODEL_FIELDS, *EXTRACTOR_FIELDS):
        allowed |= {row.setting: row.allowed, **dict.fromkeys(row.aliases, ())}
    prefix = f"{section_name}." if section_name else ""
    keys: dict[str, tuple[Any, ...]] = {}
    for setting in sorted(allowed):
        if setting.startswith(prefix):
            key, _, rest = setting.removeprefix(prefix).partition(".")
            keys[key] = () if rest else allowed[setting]
    return keys


def make_section(
    name: str,
    *,
    read: str = "",
    values: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: str = "",
    classes: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    strict: bool = True,
) -> tuple[str, Section]:
    """Return the name of a section and its keys, to which those of the table of fields are added.

    Args:
        name: dotted path of the section; empty for the root.
        read: other keys that are read, separated by spaces.
        values: other keys of which only these values are implemented.
        ignored: keys that cannot change the result of inference, separated by spaces.
        classes: see `Section`.
        refused: see `Section`.
        strict: see `Section`.
    """
    read_keys: dict[str, tuple[Any, ...]] = {"_target_": ()} if classes else {}
    read_keys |= dict.fromkeys(read.split(), ())
    read_keys |= table_keys(name)
    read_keys |= values or {}
    return name, Section(read_keys, tuple(ignored.split()), classes, refused or {}, strict)


# descriptions of models that are not implemented, for errors
MULTI_SOFTMAX = "a model with one output layer per language (multi-softmax)"
CANARY = "a tokenizer of a multitask model such as Canary"

DATA_KEYS = """
    _target_ audio_locator_tag augmentor batch_duration batch_size batch_tokens bin bucket_batch_size
    bucket_buffer_size bucket_duration_bins bucketing_2d_strict_mode bucketing_batch_size bucketing_strategy
    bucketing_weights channel_selector concatenate_samples concurrent_bucketing cuda_expandable_segments
    cuts_path defer_setup drop_last force_finite force_iterable_dataset force_map_dataset input_cfg is_concat
    is_tarred keep_excessive_supervisions labels lang_field lhotse manifest_filepath max_cer max_duration
    max_open_streams max_tokens max_tps max_utts metadata_only min_duration min_tokens min_tps multi_config name
    normalize_transcripts num_buckets num_cuts_for_bins_estimate num_workers parser perturb_speed pin_memory
    pretokenize prompt_format quadratic_duration quadratic_factor return_sample_id reweight_temperature
    sample_rate sampler_fusion sampler_weights seed shar_path shard_manifests shard_seed shuffle
    shuffle_buffer_size shuffle_n skip_missing_manifest_entries slice_length tarred_audio_filepaths
    tarred_random_access tarred_shard_strategy text_field trim trim_silence truncate_duration use_bucketing
    use_lhotse use_multimodal_sampling use_start_end_token
"""

# the sections by dotted path; "" is the root
SECTIONS: dict[str, Section] = dict([
    make_section(
        "",
        strict=False,
        read="target tokenizer",
        ignored="""
            compute_eval_loss exp_manager hydra init_from_nemo_model init_from_pretrained_model interctc
            log_prediction model_defaults name nemo_version optim prompt_defaults restore_timestamps sample_rate
            skip_nan_grad test_ds tokenizer_type train_ds trainer use_cer validation_ds variational_noise
            wandb_logger_kwargs
        """,
        refused={
            "adapters": "adapters",
            "num_prompts": PROMPT,
            "spk_kernel_type": MULTI_TALKER,
            "spk_kernel_layers": MULTI_TALKER,
        },
    ),
    make_section(
        "encoder",
        ignored="""
            att_chunk_context_size att_context_probs conv_context_style reduction_factor reduction_position
            subsampling_conv_chunking_factor sync_max_audio_length untie_biases use_pytorch_sdpa
            use_pytorch_sdpa_backends
        """,
        values={"feat_out": (-1, 0, None), "reduction": (None,), "subsampling": ("dw_striding",)},
        classes=("ConformerEncoder",),
    ),
    make_section(
        "preprocessor",
        ignored="dither nb_augmentation_prob nb_max_freq pad_to pad_value rng stft_conv stft_exact_pad use_torchaudio",
        values={
            "window": ("hann",),
            "mag_power": (2.0,),
            "mel_norm": ("slaney",),
            "lowfreq": (0,),
            "highfreq": (None, 8000),
            "log": (True,),
            "log_zero_guard_type": ("add",),
            "log_zero_guard_value": (LOG_ZERO_GUARD,),
            "frame_splicing": (1,),
            "exact_pad": (False,),
        },
        classes=("AudioToMelSpectrogramPreprocessor",),
    ),
    make_section(
        "tokenizer",
        read="langs model_path",
        ignored="dir hf_kwargs spe_tokenizer_vocab vocab_path",
        values={"type": ("bpe", "agg"), "special_tokens": (None,)},
        refused={"custom_tokenizer": CANARY},
    ),
    make_section(
        "decoder",
        ignored="feat_in init_mode random_state_sampling",
        values={"normalization_mode": (None,), "blank_as_pad": (True,), "add_blank": (True,)},
        classes=("RNNTDecoder", "ConvASRDecoder"),
        refused={"multisoftmax": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    make_section(
        "decoder.prednet",
        ignored="forget_gate_bias hidden_hidden_bias_scale t_max weights_init_scale",
        values={"rnn_hidden_size": (-1, 0, None), "norm": (None,)},
    ),
    make_section(
        "joint",
        ignored="experimental_fuse_loss_wer fuse_loss_wer fused_batch_size log_softmax masking_prob preserve_memory",
        classes=("RNNTJoint",),
        refused={"multilingual": MULTI_SOFTMAX, "language_keys": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    make_section("joint.jointnet", ignored="encoder_hidden pred_hidden"),
    make_section("aux_ctc", strict=False, ignored="decoding use_cer"),
    make_section(
        "aux_ctc.decoder",
        ignored="feat_in init_mode",
        values={"add_blank": (True,)},
        classes=("ConvASRDecoder",),
        refused={"multisoftmax": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    make_section(
        "decoding",
        strict=False,
        read="big_blank_durations model_type",
        ignored="""
            batch_dim_index beam compute_hypothesis_token_set compute_langs compute_timestamps confidence_cfg
            ctc_timestamp_type fused_batch_size lang_tag_pattern preserve_alignments rnnt_timestamp_type strategy
            strip_lang_tags tdt_include_duration tdt_include_token_duration temperature wfst word_seperator
        """,
    ),
    make_section(
        "decoding.greedy",
        strict=False,
        ignored="""
            allow_cuda_graphs boosting_tree boosting_tree_alpha compute_timestamps confidence_method_cfg
            enable_per_stream_biasing fusion_models fusion_models_alpha include_duration loop_labels max_batch_size
            ngram_lm_alpha ngram_lm_model preserve_alignments preserve_frame_confidence preserve_step_confidence
            tdt_include_duration_confidence tdt_include_token_duration use_cuda_graph_decoder
        """,
    ),
    make_section(
        "loss",
        strict=False,
        ignored="_target_ offline_loss_weight streaming_loss_weight",
        values={"loss_name": ("default", "warprnnt", "warprnnt_numba", "pytorch", "tdt", "tdt_pytorch", "tdt_triton")},
    ),
    make_section("train_ds", strict=False, ignored=DATA_KEYS),
    make_section("validation_ds", strict=False, ignored=DATA_KEYS),
    make_section("test_ds", strict=False, ignored=DATA_KEYS),
    make_section(
        "optim",
        strict=False,
        ignored="_target_ args betas capturable eps foreach fused lr momentum name sched weight_decay",
    ),
    make_section(
        "trainer",
        strict=False,
        ignored="""
            accelerator accumulate_grad_batches benchmark check_val_every_n_epoch deterministic devices
            enable_checkpointing enable_progress_bar gradient_clip_val limit_test_batches limit_train_batches
            limit_val_batches log_every_n_steps logger max_epochs max_steps max_time num_nodes num_sanity_val_steps
            precision strategy sync_batchnorm use_distributed_sampler val_check_interval
        """,
    ),
])  # fmt: skip

# sections that are checked only if the model has the part that they describe
TRANSDUCER_SECTIONS = ("decoder.prednet", "joint", "joint.jointnet")
CTC_HEAD_SECTIONS = ("aux_ctc", "aux_ctc.decoder")

# class of a model -> whether it is a hybrid, a transducer with a CTC head
MODEL_CLASSES = {
    "EncDecCTCModelBPE": False,
    "EncDecRNNTBPEModel": False,
    "EncDecRNNTBPEEOUModel": False,
    "EncDecHybridRNNTCTCBPEModel": True,
    "EncDecHybridRNNTCTCBPEEOUModel": True,
}
# text in the name of another class -> description of its models
UNSUPPORTED_CLASSES = {
    "WithPrompt": PROMPT,
    "MultiTalker": MULTI_TALKER,
    "MultiTask": "a multitask model such as Canary, which stock transformers runs",
    "EncDecCTCModel": "a model of characters without a tokenizer",
    "EncDecRNNTModel": "a model of characters without a tokenizer",
}

# setting -> what to do if its value is refused; `NEEDS_NEMO` for the others
ADVICE = {
    "encoder._target_": "merge or disable adapters in NeMo and save again; other encoders need NeMo",
    "encoder.self_attention_model": (
        "call `model.change_attention_model('rel_pos', [-1, -1])` in NeMo and save again; the weights are the same"
    ),
    "decoder._target_": "stateless prediction networks and other decoders need NeMo",
    "adapters": "merge or remove the adapters in NeMo and save again",
    "target": "set `target` of a derived class to its base class; other models need NeMo",
    "tokenizer.type": "WordPiece (wpe) and character vocabularies need NeMo, where `change_vocabulary` gives a bpe one",
}


def class_name(target: Any) -> str:
    """Return the class in a dotted path such as `nemo.collections.asr.modules.ConformerEncoder`."""
    return str(target).rpartition(".")[2]


def find_kind(settings: Settings) -> str:
    """Return the kind of head, `"ctc"`, `"rnnt"` or `"tdt"`. NeMo's class names do not distinguish the transducers."""
    if "joint" not in settings:
        return "ctc"
    is_tdt = (
        find_setting(settings, "decoding.durations")
        or find_setting(settings, "decoding.model_type") == "tdt"
        or find_setting(settings, "loss.loss_name") == "tdt"
        or find_setting(settings, "joint.num_extra_outputs")
    )
    return "tdt" if is_tdt else "rnnt"


def has_ctc_head(settings: Settings, weight_names: Iterable[str]) -> bool:
    """Return whether a transducer has a CTC head as well.

    The settings do not tell: models of other classes may have a section `aux_ctc` that NeMo does not read.

    Args:
        settings: the resolved settings.
        weight_names: names of the weights in the file.

    Raises:
        NemoError: the class is a hybrid, but the file has no weights of a CTC head.
    """
    name = class_name(find_setting(settings, "target"))
    has_weights = any(key.startswith("ctc_decoder.") for key in weight_names)
    if MODEL_CLASSES.get(name) and not has_weights:
        raise NemoError(
            f"a model of the class {name} must have a CTC head, but the file has no weights `ctc_decoder.*`: save it "
            "again, or set `target` to EncDecRNNTBPEModel"
        )
    return has_weights


def check_settings(settings: Settings, *, is_transducer: bool, has_ctc_head: bool) -> list[str]:
    """Refuse settings that are not implemented.

    Args:
        settings: the resolved settings.
        is_transducer: the model has a prediction network and a joint network.
        has_ctc_head: the model is a transducer that also has a CTC head.

    Returns:
        Dotted paths of unknown settings that cannot change the result of inference.

    Raises:
        NemoError: a setting that can change the result of inference is not implemented, or a section is missing.
    """
    check_class(settings.get("target"))
    big_blank_durations = find_setting(settings, "decoding.big_blank_durations")
    if big_blank_durations:
        raise NemoError(
            f"`decoding.big_blank_durations` must be empty, got {big_blank_durations!r}: multi-blank transducers need "
            "NeMo"
        )
    skipped = (*(() if is_transducer else TRANSDUCER_SECTIONS), *(() if has_ctc_head else CTC_HEAD_SECTIONS))
    unknown: list[str] = []
    for name, section in SECTIONS.items():
        if name not in skipped:
            unknown += check_section(find_setting(settings, name), name, section)
    return unknown


def check_class(target: Any) -> None:
    """Refuse a model class (the setting `target`) that is not implemented; a missing class is accepted."""
    name = class_name(target)
    if not target or name in MODEL_CLASSES:
        return
    for text, description in UNSUPPORTED_CLASSES.items():
        if text in name:
            raise NemoError(f"`target` is {target!r}, {description}: such a model is not implemented here")
    raise NemoError(f"`target` must be {' or '.join(MODEL_CLASSES)}, got {target!r}: {ADVICE['target']}")


def check_section(values: Any, name: str, section: Section) -> list[str]:
    """Refuse settings of one section that are not implemented.

    Args:
        values: the settings of the section; None if the file does not have it.
        name: its dotted path.
        section: its known keys.

    Returns:
        Dotted paths of its unknown settings, if the section is not strict.

    Raises:
        NemoError: the section is strict and missing or has an unknown setting, or a setting belongs to a model that is
            not implemented.
    """
    if values is None and not section.strict:
        return []
    if not isinstance(values, dict):
        if section.strict:
            raise NemoError(f"the settings have no section `{name}`: save the model again in NeMo")
        return [name]
    unknown = []
    for key, value in values.items():
        setting = f"{name}.{key}".removeprefix(".")
        advice = ADVICE.get(setting, NEEDS_NEMO)
        if key in section.ignored or (key in section.refused and value is None):
            continue
        if key in section.refused:
            raise NemoError(f"`{setting}` belongs to {section.refused[key]}: {advice}")
        if section.strict and isinstance(value, str) and "${" in value:
            raise NemoError(
                f"`{setting}` must be a value, got {value!r}, an interpolation that points outside the file: write the "
                f"value into {SETTINGS}"
            )
        problem = find_problem(section, key, value)
        if problem and section.strict:
            raise NemoError(f"`{setting}` {problem}: {advice}")
        if problem:
            unknown.append(setting)
    return unknown


def find_problem(section: Section, key: str, value: Any) -> str | None:
    """Return what is wrong with a setting, as the rest of a sentence that starts with its name; None if it is right.

    Args:
        section: the section of the setting.
        key: name of the setting in the section.
        value: its value.
    """
    if key not in section.read:
        return f"is not a known setting, and its value {value!r} may change the result"
    if key == "_target_" and section.classes and class_name(value) not in section.classes:
        return f"must be {' or '.join(section.classes)}, got {value!r}"
    allowed = section.read[key]
    if allowed and (value.lower() if isinstance(value, str) else value) not in allowed:
        return f"must be {' or '.join(map(repr, allowed))}, got {value!r}"
    return None


def check_vocabulary(settings: Settings, num_pieces: int) -> None:
    """Refuse a file whose settings and tokenizer have different numbers of pieces.

    Args:
        settings: the resolved settings.
        num_pieces: number of pieces of the tokenizer, without the blank.
    """
    for path in VOCABULARY_COUNTS:
        count = find_setting(settings, path)
        # NeMo's templates have -1 or 0 for a number that is not known yet
        if isinstance(count, int) and count > 0 and count != num_pieces:
            raise NemoError(
                f"`{path}` is {count}, but the tokenizer has {num_pieces} pieces: the file mixes two models"
            )
    for path in VOCABULARY_LISTS:
        pieces = find_setting(settings, path)
        if isinstance(pieces, list) and pieces and len(pieces) != num_pieces:
            raise NemoError(
                f"`{path}` has {len(pieces)} entries, but the tokenizer has {num_pieces} pieces: the file mixes two "
                "models"
            )

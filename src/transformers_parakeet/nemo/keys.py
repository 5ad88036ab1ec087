"""Defines which settings of a `.nemo` file are read, ignored or refused, and checks the settings of a file.

Settings that become fields of our configuration are taken from the tables in `fields.py`.
`conversion/settings_table.py` writes the sections into docs/conversion.md.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..feature_extraction_parakeet import LOG_ZERO_GUARD
from .archive import SETTINGS_FILE, NemoError
from .fields import (
    ENCODER_FIELDS,
    EXTRACTOR_FIELDS,
    MODEL_FIELDS,
    MULTI_TALKER_MODEL,
    NEEDS_NEMO,
    PROMPT_MODEL,
    VOCABULARY_COUNTS,
    VOCABULARY_LISTS,
)
from .settings import Settings, find_setting


@dataclass(frozen=True)
class Section:
    """The known keys of one section of the settings.

    Args:
        allowed_values: key that is read -> supported values; an empty tuple means that every value is supported.
        ignored: keys that cannot change the result of inference.
        allowed_classes: supported class names in `_target_`, without the module path; empty if the section has no
            `_target_`.
        refused: key of an unsupported type of model -> description of the models that have the key.
        is_strict: whether unknown keys and values are errors. Otherwise they are ignored, and one warning lists them.
    """

    allowed_values: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    allowed_classes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    is_strict: bool = True


def collect_field_keys(section_name: str) -> dict[str, tuple[Any, ...]]:
    """Collect the keys of a section that the tables in `fields.py` read.

    Args:
        section_name: dotted path of the section; empty for the root.

    Returns:
        Key -> supported values, or an empty tuple if every value is supported. Names of sub-sections are included: the
        setting `encoder.d_model` adds the key `encoder` to the root.
    """
    allowed_by_setting: dict[str, tuple[Any, ...]] = dict.fromkeys((*VOCABULARY_COUNTS, *VOCABULARY_LISTS), ())
    for model_field in (*ENCODER_FIELDS, *MODEL_FIELDS, *EXTRACTOR_FIELDS):
        allowed_by_setting[model_field.setting] = model_field.allowed_values
        allowed_by_setting |= dict.fromkeys(model_field.aliases, ())
    prefix = f"{section_name}." if section_name else ""
    allowed_by_key: dict[str, tuple[Any, ...]] = {}
    for setting in sorted(allowed_by_setting):
        if setting.startswith(prefix):
            key, _, sub_key = setting.removeprefix(prefix).partition(".")
            allowed_by_key[key] = () if sub_key else allowed_by_setting[setting]
    return allowed_by_key


def make_section(
    name: str,
    *,
    other_keys: str = "",
    allowed_values: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: str = "",
    allowed_classes: tuple[str, ...] = (),
    refused: Mapping[str, str] | None = None,
    is_strict: bool = True,
) -> tuple[str, Section]:
    """Define a section of the settings: the keys given here and the keys that the tables in `fields.py` read.

    Args:
        name: dotted path of the section; empty for the root.
        other_keys: further keys that are read and may have any value, separated by spaces.
        allowed_values: further keys that are read -> supported values.
        ignored: keys that cannot change the result of inference, separated by spaces.
        allowed_classes: supported class names in `_target_`; empty if the section has no `_target_`.
        refused: key of an unsupported type of model -> description of the models that have the key.
        is_strict: whether unknown keys and values are errors.

    Returns:
        The name and the section, an entry of `SECTIONS`.
    """
    all_allowed_values: dict[str, tuple[Any, ...]] = {"_target_": ()} if allowed_classes else {}
    all_allowed_values |= dict.fromkeys(other_keys.split(), ())
    all_allowed_values |= collect_field_keys(name)
    all_allowed_values |= allowed_values or {}
    return name, Section(all_allowed_values, tuple(ignored.split()), allowed_classes, refused or {}, is_strict)


# descriptions of models and tokenizers that are not supported, for error messages
MULTI_SOFTMAX_MODEL = "a model with one output layer per language (multi-softmax)"
CANARY_TOKENIZER = "a tokenizer of a multitask model such as Canary"

DATASET_KEYS = """
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

# dotted path -> section; "" is the root
SECTIONS: dict[str, Section] = dict([
    make_section(
        "",
        is_strict=False,
        other_keys="target tokenizer",
        ignored="""
            compute_eval_loss exp_manager hydra init_from_nemo_model init_from_pretrained_model interctc
            log_prediction model_defaults name nemo_version optim prompt_defaults restore_timestamps sample_rate
            skip_nan_grad test_ds tokenizer_type train_ds trainer use_cer validation_ds variational_noise
            wandb_logger_kwargs
        """,
        refused={
            "adapters": "adapters",
            "num_prompts": PROMPT_MODEL,
            "spk_kernel_type": MULTI_TALKER_MODEL,
            "spk_kernel_layers": MULTI_TALKER_MODEL,
        },
    ),
    make_section(
        "encoder",
        ignored="""
            att_chunk_context_size att_context_probs conv_context_style reduction_factor reduction_position
            subsampling_conv_chunking_factor sync_max_audio_length untie_biases use_pytorch_sdpa
            use_pytorch_sdpa_backends
        """,
        allowed_values={"feat_out": (-1, 0, None), "reduction": (None,), "subsampling": ("dw_striding",)},
        allowed_classes=("ConformerEncoder",),
    ),
    make_section(
        "preprocessor",
        ignored="dither nb_augmentation_prob nb_max_freq pad_to pad_value rng stft_conv stft_exact_pad use_torchaudio",
        allowed_values={
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
        allowed_classes=("AudioToMelSpectrogramPreprocessor",),
    ),
    make_section(
        "tokenizer",
        other_keys="langs model_path",
        ignored="dir hf_kwargs spe_tokenizer_vocab vocab_path",
        allowed_values={"type": ("bpe", "agg"), "special_tokens": (None,)},
        refused={"custom_tokenizer": CANARY_TOKENIZER},
    ),
    make_section(
        "decoder",
        ignored="feat_in init_mode random_state_sampling",
        allowed_values={"normalization_mode": (None,), "blank_as_pad": (True,), "add_blank": (True,)},
        allowed_classes=("RNNTDecoder", "ConvASRDecoder"),
        refused={"multisoftmax": MULTI_SOFTMAX_MODEL, "language_masks": MULTI_SOFTMAX_MODEL},
    ),
    make_section(
        "decoder.prednet",
        ignored="forget_gate_bias hidden_hidden_bias_scale t_max weights_init_scale",
        allowed_values={"rnn_hidden_size": (-1, 0, None), "norm": (None,)},
    ),
    make_section(
        "joint",
        ignored="experimental_fuse_loss_wer fuse_loss_wer fused_batch_size log_softmax masking_prob preserve_memory",
        allowed_classes=("RNNTJoint",),
        refused=dict.fromkeys(("multilingual", "language_keys", "language_masks"), MULTI_SOFTMAX_MODEL),
    ),
    make_section("joint.jointnet", ignored="encoder_hidden pred_hidden"),
    make_section("aux_ctc", is_strict=False, ignored="decoding use_cer"),
    make_section(
        "aux_ctc.decoder",
        ignored="feat_in init_mode",
        allowed_values={"add_blank": (True,)},
        allowed_classes=("ConvASRDecoder",),
        refused={"multisoftmax": MULTI_SOFTMAX_MODEL, "language_masks": MULTI_SOFTMAX_MODEL},
    ),
    make_section(
        "decoding",
        is_strict=False,
        other_keys="big_blank_durations model_type",
        ignored="""
            batch_dim_index beam compute_hypothesis_token_set compute_langs compute_timestamps confidence_cfg
            ctc_timestamp_type fused_batch_size lang_tag_pattern preserve_alignments rnnt_timestamp_type strategy
            strip_lang_tags tdt_include_duration tdt_include_token_duration temperature wfst word_seperator
        """,
    ),
    make_section(
        "decoding.greedy",
        is_strict=False,
        ignored="""
            allow_cuda_graphs boosting_tree boosting_tree_alpha compute_timestamps confidence_method_cfg
            enable_per_stream_biasing fusion_models fusion_models_alpha include_duration loop_labels max_batch_size
            ngram_lm_alpha ngram_lm_model preserve_alignments preserve_frame_confidence preserve_step_confidence
            tdt_include_duration_confidence tdt_include_token_duration use_cuda_graph_decoder
        """,
    ),
    make_section(
        "loss",
        is_strict=False,
        ignored="_target_ offline_loss_weight streaming_loss_weight",
        allowed_values={
            "loss_name": ("default", "warprnnt", "warprnnt_numba", "pytorch", "tdt", "tdt_pytorch", "tdt_triton"),
        },
    ),
    make_section("train_ds", is_strict=False, ignored=DATASET_KEYS),
    make_section("validation_ds", is_strict=False, ignored=DATASET_KEYS),
    make_section("test_ds", is_strict=False, ignored=DATASET_KEYS),
    make_section(
        "optim",
        is_strict=False,
        ignored="_target_ args betas capturable eps foreach fused lr momentum name sched weight_decay",
    ),
    make_section(
        "trainer",
        is_strict=False,
        ignored="""
            accelerator accumulate_grad_batches benchmark check_val_every_n_epoch deterministic devices
            enable_checkpointing enable_progress_bar gradient_clip_val limit_test_batches limit_train_batches
            limit_val_batches log_every_n_steps logger max_epochs max_steps max_time num_nodes num_sanity_val_steps
            precision strategy sync_batchnorm use_distributed_sampler val_check_interval
        """,
    ),
])  # fmt: skip

# sections that are checked only if the model is a transducer, or only if it is a transducer with a CTC head
TRANSDUCER_SECTIONS = ("decoder.prednet", "joint", "joint.jointnet")
CTC_HEAD_SECTIONS = ("aux_ctc", "aux_ctc.decoder")

# class name of a NeMo model -> whether the model is a hybrid (a transducer with a CTC head)
NEMO_MODEL_CLASSES = {
    "EncDecCTCModelBPE": False,
    "EncDecRNNTBPEModel": False,
    "EncDecRNNTBPEEOUModel": False,
    "EncDecHybridRNNTCTCBPEModel": True,
    "EncDecHybridRNNTCTCBPEEOUModel": True,
}
# part of the name of an unsupported class -> description of the models of that class
UNSUPPORTED_CLASS_NAMES = {
    "WithPrompt": PROMPT_MODEL,
    "MultiTalker": MULTI_TALKER_MODEL,
    "MultiTask": "a multitask model such as Canary, which stock transformers runs",
    "EncDecCTCModel": "a character model without a tokenizer",
    "EncDecRNNTModel": "a character model without a tokenizer",
}

# setting -> advice for the error about an unsupported value; the default advice is `NEEDS_NEMO`
ADVICE_BY_SETTING = {
    "encoder._target_": "merge or disable adapters in NeMo and save again; other encoders need NeMo",
    "encoder.self_attention_model": (
        "call `model.change_attention_model('rel_pos', [-1, -1])` in NeMo and save again; the weights are the same"
    ),
    "decoder._target_": "stateless prediction networks and other decoders need NeMo",
    "adapters": "merge or remove the adapters in NeMo and save again",
    "target": "set `target` of a derived class to its base class; other models need NeMo",
    "tokenizer.type": "WordPiece (wpe) and character vocabularies need NeMo, where `change_vocabulary` gives a bpe one",
}


def get_class_name(target: Any) -> str:
    """Return the class name at the end of a dotted path such as `nemo.collections.asr.modules.ConformerEncoder`.

    Args:
        target: value of a setting `target` or `_target_`.
    """
    return str(target).rpartition(".")[2]


def detect_head_type(settings: Settings) -> str:
    """Return the type of head, `"ctc"`, `"rnnt"` or `"tdt"`.

    NeMo uses the same class names for RNN-T and TDT models, so the settings of decoding, loss and joint network decide.

    Args:
        settings: resolved settings of a `.nemo` file.
    """
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
    """Return whether a transducer also has a CTC head.

    The weights decide, because a file without a CTC head may have a section `aux_ctc` that NeMo does not read.

    Args:
        settings: resolved settings of the `.nemo` file.
        weight_names: NeMo's names of the weights in the file.

    Raises:
        NemoError: the model class requires a CTC head, but the file has no weights of a CTC head.
    """
    model_class = get_class_name(find_setting(settings, "target"))
    has_ctc_weights = any(name.startswith("ctc_decoder.") for name in weight_names)
    if NEMO_MODEL_CLASSES.get(model_class) and not has_ctc_weights:
        raise NemoError(
            f"a model of the class {model_class} must have a CTC head, but the file has no weights `ctc_decoder.*`: "
            "save the model again, or set `target` to EncDecRNNTBPEModel"
        )
    return has_ctc_weights


def check_settings(settings: Settings, *, is_transducer: bool, has_ctc_head: bool) -> list[str]:
    """Check that all settings of a `.nemo` file are supported.

    Args:
        settings: resolved settings of the `.nemo` file.
        is_transducer: whether the model has a prediction network and a joint network.
        has_ctc_head: whether the transducer also has a CTC head.

    Returns:
        Dotted paths of unknown settings that cannot change the result of inference.

    Raises:
        NemoError: a setting that can change the result of inference is not supported, or a section is missing.
    """
    check_class(settings.get("target"))
    big_blank_durations = find_setting(settings, "decoding.big_blank_durations")
    if big_blank_durations:
        raise NemoError(
            f"`decoding.big_blank_durations` must be empty, got {big_blank_durations!r}: multi-blank transducers need "
            "NeMo"
        )
    # sections of networks that the model does not have are not checked
    skipped_sections = (*(() if is_transducer else TRANSDUCER_SECTIONS), *(() if has_ctc_head else CTC_HEAD_SECTIONS))
    unknown_settings: list[str] = []
    for name, section in SECTIONS.items():
        if name not in skipped_sections:
            unknown_settings += check_section(find_setting(settings, name), name, section)
    return unknown_settings


def check_class(target: Any) -> None:
    """Check that the model class is supported.

    Args:
        target: the setting `target`, a dotted path that ends with the class name. A missing class (None) is accepted.

    Raises:
        NemoError: the class is not supported.
    """
    model_class = get_class_name(target)
    if not target or model_class in NEMO_MODEL_CLASSES:
        return
    for name_part, description in UNSUPPORTED_CLASS_NAMES.items():
        if name_part in model_class:
            raise NemoError(f"`target` is {target!r}, {description}: such a model is not supported")
    raise NemoError(
        f"`target` must be {' or '.join(NEMO_MODEL_CLASSES)}, got {target!r}: {ADVICE_BY_SETTING['target']}"
    )


def check_section(values: Any, section_name: str, section: Section) -> list[str]:
    """Check that all settings of one section are supported.

    Args:
        values: settings of the section in the file; None if the file does not have the section.
        section_name: dotted path of the section; empty for the root.
        section: known keys of the section. If the section is strict, unknown keys and values are errors.

    Returns:
        Dotted paths of unknown settings if the section is not strict; otherwise an empty list.

    Raises:
        NemoError: a strict section is missing or contains an unknown key or value, or a key belongs to an unsupported
            type of model.
    """
    if values is None and not section.is_strict:
        return []
    if not isinstance(values, dict):
        if section.is_strict:
            raise NemoError(f"the settings have no section `{section_name}`: save the model again in NeMo")
        return [section_name]
    unknown_settings = []
    for key, value in values.items():
        setting = f"{section_name}.{key}".removeprefix(".")
        advice = ADVICE_BY_SETTING.get(setting, NEEDS_NEMO)
        # a refused key with the value null means that the model does not use the unsupported feature
        if key in section.ignored or (key in section.refused and value is None):
            continue
        if key in section.refused:
            raise NemoError(f"`{setting}` belongs to {section.refused[key]}: {advice}")
        if section.is_strict and isinstance(value, str) and "${" in value:
            raise NemoError(
                f"`{setting}` must be a value, got the interpolation {value!r}, which points outside the file: write "
                f"the value into {SETTINGS_FILE}"
            )
        problem = describe_invalid_setting(section, key, value)
        if problem and section.is_strict:
            raise NemoError(f"`{setting}` {problem}: {advice}")
        if problem:
            unknown_settings.append(setting)
    return unknown_settings


def describe_invalid_setting(section: Section, key: str, value: Any) -> str | None:
    """Describe why a setting is not supported.

    Args:
        section: known keys of the section that contains the setting.
        key: name of the setting in the section.
        value: value of the setting.

    Returns:
        A message to append to the name of the setting, such as "must be 1, got 2"; None if the setting is supported.
    """
    if key not in section.allowed_values:
        return f"is not a known setting, and its value {value!r} may change the result"
    if key == "_target_" and section.allowed_classes and get_class_name(value) not in section.allowed_classes:
        return f"must be {' or '.join(section.allowed_classes)}, got {value!r}"
    allowed_values = section.allowed_values[key]
    normalized_value = value.lower() if isinstance(value, str) else value
    # an empty tuple means that every value is supported
    if allowed_values and normalized_value not in allowed_values:
        return f"must be {' or '.join(map(repr, allowed_values))}, got {value!r}"
    return None


def check_vocabulary(settings: Settings, num_pieces: int) -> None:
    """Check that the vocabulary sizes in the settings equal the vocabulary size of the tokenizer.

    Args:
        settings: resolved settings of the `.nemo` file.
        num_pieces: vocabulary size of the tokenizer without the blank.

    Raises:
        NemoError: a size differs.
    """
    for path in VOCABULARY_COUNTS:
        size = find_setting(settings, path)
        # NeMo uses the placeholders -1 and 0 for an unknown size
        if isinstance(size, int) and size > 0 and size != num_pieces:
            raise NemoError(f"`{path}` is {size}, but the tokenizer has {num_pieces} pieces: the file mixes two models")
    for path in VOCABULARY_LISTS:
        pieces = find_setting(settings, path)
        if isinstance(pieces, list) and pieces and len(pieces) != num_pieces:
            raise NemoError(
                f"`{path}` has {len(pieces)} entries, but the tokenizer has {num_pieces} pieces: the file mixes two "
                "models"
            )

"""The keys of a `.nemo` file's settings: which are read, which are ignored, and which values are refused.

What a value means is in `nemo_settings.py`. `settings_table` writes the table of docs/conversion.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..configuration_parakeet import CONTEXT_STYLES, CONV_NORM_TYPES, SELF_ATTENTION_MODELS
from ..feature_extraction_parakeet import LOG_ZERO_GUARD
from ..losses import REDUCTIONS
from .archive import SETTINGS, NemoError


@dataclass(frozen=True)
class Section:
    """The keys of one section.

    Args:
        read: keys whose values become fields of the configuration or the feature extractor, or are checked elsewhere.
        ignored: keys that cannot change inference.
        only: keys of which some values are implemented, with these values.
        classes: classes that are implemented, whatever module NeMo keeps them in; empty where there is no class.
        refused: keys of models that are not implemented, with what these models are.
        strict: refuse unknown keys and values; otherwise one warning names them and they are ignored.
    """

    read: str = ""
    ignored: str = ""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    strict: bool = True


MULTI_SOFTMAX = "a model with one output layer per language (multi-softmax)"
PROMPT = "a model that takes a prompt, such as a language, with the audio"
MULTI_TALKER = "a multi-talker model, which takes the activity of a speaker with the audio"
CANARY = "a tokenizer of a multitask model such as Canary"

DATA = Section(
    strict=False,
    ignored="""
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
    """,
)

# the file's sections by dotted path; "" is its root
SECTIONS: dict[str, Section] = {
    "": Section(
        strict=False,
        read="""
            aux_ctc decoder decoding encoder joint labels loss preprocessor sample_rate spec_augment target
            tokenizer
        """,
        ignored="""
            compute_eval_loss exp_manager hydra init_from_nemo_model init_from_pretrained_model interctc
            log_prediction model_defaults name nemo_version optim prompt_defaults restore_timestamps skip_nan_grad
            test_ds tokenizer_type train_ds trainer use_cer validation_ds variational_noise wandb_logger_kwargs
        """,
        only={"rnnt_reduction": (None, *REDUCTIONS), "ctc_reduction": (None, *REDUCTIONS)},
        refused={
            "adapters": "adapters",
            "num_prompts": PROMPT,
            "spk_kernel_type": MULTI_TALKER,
            "spk_kernel_layers": MULTI_TALKER,
        },
    ),
    "encoder": Section(
        read="""
            _target_ att_context_size causal_downsampling conv_context_size conv_kernel_size d_model dropout
            dropout_att dropout_emb dropout_pre_encoder feat_in ff_expansion_factor global_attn_separate
            global_tokens global_tokens_spacing n_heads n_layers pos_emb_max_len stochastic_depth_drop_prob
            stochastic_depth_start_layer subsampling_conv_channels subsampling_factor use_bias xscaling
        """,
        ignored="""
            att_chunk_context_size att_context_probs conv_context_style reduction_factor reduction_position
            subsampling_conv_chunking_factor sync_max_audio_length untie_biases use_pytorch_sdpa
            use_pytorch_sdpa_backends
        """,
        only={
            "stochastic_depth_mode": ("linear", "uniform"),
            "att_context_style": CONTEXT_STYLES,
            "conv_norm_type": CONV_NORM_TYPES,
            "feat_out": (-1, 0, None),
            "reduction": (None,),
            "self_attention_model": SELF_ATTENTION_MODELS,
            "subsampling": ("dw_striding",),
        },
        classes=("ConformerEncoder",),
    ),
    "preprocessor": Section(
        read="_target_ features n_fft n_window_size n_window_stride normalize preemph window_size window_stride",
        ignored="dither nb_augmentation_prob nb_max_freq pad_to pad_value rng stft_conv stft_exact_pad use_torchaudio",
        only={
            "sample_rate": (16000,),
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
    "tokenizer": Section(
        read="langs model_path",
        ignored="dir hf_kwargs spe_tokenizer_vocab vocab_path",
        only={"type": ("bpe", "agg"), "special_tokens": (None,)},
        refused={"custom_tokenizer": CANARY},
    ),
    "decoder": Section(
        read="_target_ num_classes prednet vocab_size vocabulary",
        ignored="feat_in init_mode random_state_sampling",
        only={"normalization_mode": (None,), "blank_as_pad": (True,), "add_blank": (True,)},
        classes=("RNNTDecoder", "ConvASRDecoder"),
        refused={"multisoftmax": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    "decoder.prednet": Section(
        read="dropout pred_hidden pred_rnn_layers",
        ignored="forget_gate_bias hidden_hidden_bias_scale t_max weights_init_scale",
        only={"rnn_hidden_size": (-1, 0, None), "norm": (None,)},
    ),
    "joint": Section(
        read="_target_ jointnet num_classes num_extra_outputs vocabulary",
        ignored="experimental_fuse_loss_wer fuse_loss_wer fused_batch_size log_softmax masking_prob preserve_memory",
        classes=("RNNTJoint",),
        refused={"multilingual": MULTI_SOFTMAX, "language_keys": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    "joint.jointnet": Section(
        read="dropout joint_hidden", ignored="encoder_hidden pred_hidden",
        only={"activation": ("relu", "tanh", "sigmoid")},
    ),
    "aux_ctc": Section(
        strict=False,
        read="ctc_loss_weight decoder",
        ignored="decoding use_cer",
        only={"ctc_reduction": (None, *REDUCTIONS)},
    ),
    "aux_ctc.decoder": Section(
        read="_target_ num_classes vocabulary", ignored="feat_in init_mode",
        only={"add_blank": (True,)},
        classes=("ConvASRDecoder",),
        refused={"multisoftmax": MULTI_SOFTMAX, "language_masks": MULTI_SOFTMAX},
    ),
    "decoding": Section(
        strict=False,
        read="big_blank_durations durations greedy model_type segment_gap_threshold segment_seperators",
        ignored="""
            batch_dim_index beam compute_hypothesis_token_set compute_langs compute_timestamps confidence_cfg
            ctc_timestamp_type fused_batch_size lang_tag_pattern preserve_alignments rnnt_timestamp_type strategy
            strip_lang_tags tdt_include_duration tdt_include_token_duration temperature wfst word_seperator
        """,
    ),
    "decoding.greedy": Section(
        strict=False,
        read="max_symbols max_symbols_per_step",
        ignored="""
            allow_cuda_graphs boosting_tree boosting_tree_alpha compute_timestamps confidence_method_cfg
            enable_per_stream_biasing fusion_models fusion_models_alpha include_duration loop_labels max_batch_size
            ngram_lm_alpha ngram_lm_model preserve_alignments preserve_frame_confidence preserve_step_confidence
            tdt_include_duration_confidence tdt_include_token_duration use_cuda_graph_decoder
        """,
    ),
    "loss": Section(
        strict=False,
        read="tdt_kwargs warprnnt_numba_kwargs",
        ignored="_target_ offline_loss_weight streaming_loss_weight",
        only={"loss_name": ("default", "warprnnt", "warprnnt_numba", "pytorch", "tdt", "tdt_pytorch", "tdt_triton")},
    ),
    "train_ds": DATA,
    "validation_ds": DATA,
    "test_ds": DATA,
    "optim": Section(
        strict=False,
        ignored="_target_ args betas capturable eps foreach fused lr momentum name sched weight_decay",
    ),
    "trainer": Section(
        strict=False,
        ignored="""
            accelerator accumulate_grad_batches benchmark check_val_every_n_epoch deterministic devices
            enable_checkpointing enable_progress_bar gradient_clip_val limit_test_batches limit_train_batches
            limit_val_batches log_every_n_steps logger max_epochs max_steps max_time num_nodes num_sanity_val_steps
            precision strategy sync_batchnorm use_distributed_sampler val_check_interval
        """,
    ),
}  # fmt: skip

# sections whose keys are checked only where the model has what they describe
TRANSDUCER_SECTIONS = ("decoder.prednet", "joint", "joint.jointnet")
CTC_HEAD_SECTIONS = ("aux_ctc", "aux_ctc.decoder")

# class of a model -> whether it has a CTC head beside the transducer
MODEL_CLASSES = {
    "EncDecCTCModelBPE": False,
    "EncDecRNNTBPEModel": False,
    "EncDecRNNTBPEEOUModel": False,
    "EncDecHybridRNNTCTCBPEModel": True,
    "EncDecHybridRNNTCTCBPEEOUModel": True,
}
# part of the name of another class -> what such a model is
OTHER_CLASSES = {
    "WithPrompt": PROMPT,
    "MultiTalker": MULTI_TALKER,
    "MultiTask": "a multitask model such as Canary, which stock transformers runs",
    "EncDecCTCModel": "a model of characters without a tokenizer",
    "EncDecRNNTModel": "a model of characters without a tokenizer",
}

# setting -> what to do when its value is refused
ADVICE = {
    "encoder._target_": "merge or disable adapters in NeMo and save again; other encoders need NeMo",
    "encoder.self_attention_model": (
        "call `model.change_attention_model('rel_pos', [-1, -1])` in NeMo and save again; the weights are the same"
    ),
    "decoder._target_": "stateless prediction networks and other decoders need NeMo",
    "adapters": "merge or remove the adapters in NeMo and save again",
    "target": "of a class derived from these, set `target` to its base; other models need NeMo",
    "tokenizer.type": "WordPiece (wpe) and character vocabularies need NeMo; `change_vocabulary` there gives a bpe one",
}
ELSE = "such a model needs NeMo"

# what the table of the documentation says about settings with more than a list of values
NOTES = {
    "encoder.att_context_size": (
        "one context or a list of them, the first is used; ignored for `chunked_limited_with_rc`, as in NeMo"
    ),
    "encoder.conv_context_size": "`null`, `causal`, or two counts whose sum is `conv_kernel_size` - 1",
    "encoder.subsampling_conv_channels": "-1 means `d_model`",
    "preprocessor.normalize": "`per_feature`; any other text but `all_features` means no normalisation",
    "preprocessor.n_window_size": "samples, instead of `window_size` in seconds",
    "preprocessor.n_window_stride": "samples, instead of `window_stride` in seconds",
    "preprocessor.window_stride": "10 ms",
    "joint.num_extra_outputs": "the number of durations",
    "aux_ctc": "read only for the hybrid classes",
    "target": ", ".join(f"`{name}`" for name in MODEL_CLASSES),
    "decoding.durations": "frames that a step of TDT may advance",
    "decoding.big_blank_durations": "none; multi-blank transducers are refused",
    "tokenizer.langs": "the sections of an aggregate tokenizer (`type: agg`)",
}


def last_name(target: Any) -> str:
    """Return the class of a path such as `nemo.collections.asr.modules.ConformerEncoder`."""
    return str(target).rpartition(".")[2]


def lookup(settings: Mapping[str, Any], path: str) -> Any:
    """Return a setting by its dotted path; `None` where there is none, the whole for an empty path."""
    value: Any = settings
    for key in path.split(".") if path else ():
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def refuse(setting: str, value: Any, rule: str) -> NemoError:
    """Return the error that names a setting, its value, what would do, and what to do."""
    name = setting.removeprefix(".")
    return NemoError(f"`{name}` is {value!r}, {rule}: {ADVICE.get(name, ELSE)}")


def check_settings(settings: Mapping[str, Any], *, is_transducer: bool, has_ctc_head: bool) -> list[str]:
    """Refuse what is not implemented.

    Args:
        settings: the resolved settings.
        is_transducer: the model has a prediction network and a joint network.
        has_ctc_head: it also has a CTC head.

    Returns:
        Unknown settings that cannot change inference, to be named in a warning.

    Raises:
        NemoError: a setting that can change inference is not implemented, or a section is missing.
    """
    check_class(settings.get("target"))
    if lookup(settings, "decoding.big_blank_durations"):
        raise refuse("decoding.big_blank_durations", lookup(settings, "decoding.big_blank_durations"),
                     "implemented are no multi-blank transducers")  # fmt: skip
    skipped: set[str] = set()
    if not is_transducer:
        skipped.update(TRANSDUCER_SECTIONS)
    if not (is_transducer and has_ctc_head):
        skipped.update(CTC_HEAD_SECTIONS)
    unknown: list[str] = []
    for name, section in SECTIONS.items():
        if name not in skipped:
            unknown += check_section(lookup(settings, name), name, section)
    return unknown


def check_class(target: Any) -> None:
    """Refuse a model class that is not implemented, and say what it is."""
    name = last_name(target)
    if not target or name in MODEL_CLASSES:
        return
    kind = next((text for part, text in OTHER_CLASSES.items() if part in name), None)
    if kind:
        raise NemoError(f"`target` is {target!r}, {kind}: such a model is not implemented here")
    raise refuse("target", target, f"implemented is only {' or '.join(MODEL_CLASSES)}")


def check_section(values: Any, name: str, section: Section) -> list[str]:
    """Refuse what is not implemented in one section.

    Args:
        values: its settings; `None` where the file has none.
        name: its dotted path.
        section: its keys.

    Returns:
        Its unknown settings, if they cannot change inference.
    """
    if values is None and not section.strict:
        return []
    if not isinstance(values, dict):
        if section.strict:
            raise NemoError(f"the file has no section `{name}`: save the model again in NeMo")
        return [name]
    unknown = []
    for key, value in values.items():
        setting = f"{name}.{key}"
        if key in section.refused and value is not None:
            raise NemoError(f"`{setting.removeprefix('.')}` belongs to {section.refused[key]}: {ADVICE.get(key, ELSE)}")
        problem = problem_of(section, key, value)
        if problem and section.strict:
            raise refuse(setting, value, problem)
        if problem:
            unknown.append(setting.removeprefix("."))
    return unknown


def problem_of(section: Section, key: str, value: Any) -> str | None:
    """Return what is wrong with a setting, as the rule of an error message; `None` when it is fine."""
    if key in section.ignored.split() or key in section.refused:
        return None
    if section.strict and isinstance(value, str) and "${" in value:
        return f"an interpolation that leads out of the file; write its value into {SETTINGS}"
    if key == "_target_" and section.classes and last_name(value) not in section.classes:
        return f"implemented is only {' or '.join(section.classes)}"
    if key in section.only and (value.lower() if isinstance(value, str) else value) not in section.only[key]:
        return f"implemented is only {' or '.join(map(repr, section.only[key]))}"
    known = key in section.only or key in section.read.split()
    return None if known else "which is not a setting that is known here"


def settings_table() -> str:
    """Return the table of docs/conversion.md: every known key, its values, and what happens to it."""
    lines = ["| section | key | values | |", "| --- | --- | --- | --- |"]
    for section, names in same_sections():
        title = ", ".join(f"`{name}`" if name else "(root)" for name in names)
        lines += [f"| {title} | {keys} | {values} | {use} |" for keys, values, use in table_rows(names[0], section)]
        rest = "refused" if section.strict else "ignored, one warning names them"
        lines.append(f"| {title} | any other key | | {rest} |")
    return "\n".join(lines) + "\n"


def same_sections() -> list[tuple[Section, list[str]]]:
    """Return each section with its names; some have the same keys."""
    named: list[tuple[Section, list[str]]] = []
    for name, section in SECTIONS.items():
        if named and named[-1][0] is section:
            named[-1][1].append(name)
        else:
            named.append((section, [name]))
    return named


def table_rows(name: str, section: Section) -> Iterator[tuple[str, str, str]]:
    """Yield keys, values and use of each row of one section."""
    plain = []
    for key in section.read.split():
        setting = f"{name}.{key}".removeprefix(".")
        if key == "_target_":
            yield "`_target_`", ", ".join(f"`{name}`" for name in section.classes), "read; others are refused"
        elif setting in NOTES:
            yield f"`{key}`", NOTES[setting], "read"
        else:
            plain.append(key)
    if plain:
        yield ", ".join(f"`{key}`" for key in plain), "any", "read"
    other = "refused" if section.strict else "ignored, one warning names them"
    for key, values in section.only.items():
        yield (
            f"`{key}`",
            ", ".join("`null`" if value is None else f"`{value}`" for value in values),
            f"read; others are {other}",
        )
    if section.ignored:
        yield ", ".join(f"`{key}`" for key in section.ignored.split()), "any", "ignored: no effect on inference"
    for kind in dict.fromkeys(section.refused.values()):
        yield ", ".join(f"`{key}`" for key, of in section.refused.items() if of == kind), kind, "refused"

"""Aligns a known text with a recording: the times of its words.

`decoding/alignment.py` finds the frames. `subtitles.py` writes the result.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .audio import load_audio
from .configuration_parakeet import get_blank_id, get_head_type
from .decoding import LabelAlignment, NodeScores, align_ctc, align_transducer
from .generation_arguments import check_decoder
from .long_audio import estimate_peak_memory, get_memory_budget
from .pipeline_parakeet import ParakeetASRPipeline
from .results import TimedText, TranscriptionResult, get_version, to_timed_texts
from .timestamps import EmittedTokens

# bytes of the logits of the joint network that are computed at a time
BLOCK_BYTES = 64 * 1024**2
# bytes per node of the lattice: log-probabilities, best scores and arcs
NODE_BYTES = 64


@torch.inference_mode()
def align(audio: Any, text: str, pipeline: ParakeetASRPipeline, *, decoder: str | None = None) -> TranscriptionResult:
    """Find the times of the words of a known text in a recording.

    The confidence of a token is its probability at its frame. A low confidence shows where the text and the recording
    differ.

    Args:
        audio: the recording: path, URL, bytes or (S,) samples; see `load_audio`.
        text: what is said, with the spelling of the model: a model without capitals needs a text without capitals.
        pipeline: the loaded model; see `transformers_parakeet.transcription.load_pipeline`.
        decoder: `"ctc"` or `"transducer"`; `None` for the default head of the model.

    Returns:
        The result with the text as its words, segments and tokens with times.

    Raises:
        ValueError: the text is empty, has characters that the model does not know, or is too long for the recording;
            the recording is too long for the memory; or the model does not have the head.
        AudioError: the recording cannot be read.
    """
    config, processor = pipeline.model.config, pipeline.processor
    check_decoder(config, decoder)
    head_type = "ctc" if decoder == "ctc" else get_head_type(config)
    # line breaks are spaces
    text = " ".join(text.split())
    labels = tokenize_text(processor.tokenizer, text)
    sampling_rate = processor.feature_extractor.sampling_rate
    samples = load_audio(audio, target_rate=sampling_rate)
    check_memory(pipeline, len(samples), len(labels))
    alignment = align_labels(pipeline, samples, labels, head_type)
    confidence = [math.exp(log_prob) for log_prob in alignment.log_probs]
    emitted_tokens = EmittedTokens(labels, alignment.frames, alignment.durations, confidence)
    # NeMo's times of CTC tokens start at the previous token; an alignment has the frames of each token
    time_rule = "tdt" if head_type == "ctc" else head_type
    words, segments, tokens = (
        to_timed_texts(pipeline.build_chunks(emitted_tokens, level, head_type=time_rule))
        for level in ("word", "segment", "char")
    )
    return TranscriptionResult(
        text=text,
        duration=len(samples) / sampling_rate,
        words=restore_spelling(words, text),
        segments=segments,
        tokens=tokens,
        confidence=processor.overall_confidence(emitted_tokens),
        file=audio if isinstance(audio, str) else None,
        model=pipeline.model.name_or_path or None,
        settings={"task": "align", "decoder": head_type, "score": alignment.score},
        version=get_version(),
    )


def tokenize_text(tokenizer: Any, text: str) -> list[int]:
    """Convert a text to token ids, and check that the model knows all characters.

    Args:
        tokenizer: tokenizer of the model.
        text: the text.

    Raises:
        ValueError: the text is empty, or has a character that the model does not know.
    """
    token_ids = [int(token_id) for token_id in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not text or not token_ids:
        raise ValueError("the text must have at least one word, got an empty text: pass what is said")
    if tokenizer.unk_token_id in token_ids:
        unknown = [
            character
            for character in dict.fromkeys(text)
            if tokenizer.unk_token_id in tokenizer(character, add_special_tokens=False)["input_ids"]
        ]
        raise ValueError(
            f"the text must have only characters that the model knows, got {''.join(unknown)!r}: change them (check "
            "for capitals, digits and punctuation)"
        )
    return token_ids


def check_memory(pipeline: ParakeetASRPipeline, num_samples: int, num_labels: int) -> None:
    """Check that a recording can be aligned as a whole.

    Args:
        pipeline: the pipeline.
        num_samples: number of samples of the recording.
        num_labels: number of tokens of the text.

    Raises:
        ValueError: the recording and the text need more memory than the budget.
    """
    model = pipeline.model
    num_nodes = num_samples // model.config.inputs_to_logits_ratio * (2 * num_labels + 1)
    estimate = estimate_peak_memory(model.config, num_samples, 1, model.dtype.itemsize) + num_nodes * NODE_BYTES
    budget = get_memory_budget(None, pipeline.device)
    if estimate > budget:
        raise ValueError(
            f"a recording and its text must fit into {budget / 1e9:.1f} GB of memory, but need {estimate / 1e9:.1f} "
            "GB: align parts of the recording with the text of each part"
        )


def align_labels(
    pipeline: ParakeetASRPipeline, samples: np.ndarray, labels: list[int], head_type: str
) -> LabelAlignment:
    """Compute the log-probabilities of a recording and align labels with them.

    Args:
        pipeline: the pipeline.
        samples: (S,) samples.
        labels: the U labels.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`.
    """
    model = pipeline.model
    inputs = pipeline.processor([samples], sampling_rate=pipeline.processor.feature_extractor.sampling_rate)
    features = inputs["input_features"].to(pipeline.device, model.dtype)
    outputs = model.encoder(input_features=features, attention_mask=inputs["attention_mask"].to(pipeline.device))
    num_frames = int(outputs.attention_mask[0].sum())
    # (N, H)
    hidden = outputs.last_hidden_state[0, :num_frames]
    if head_type == "ctc":
        logits = model.ctc_logits(hidden[None])[0].float()
        return align_ctc(logits.log_softmax(-1).cpu().numpy(), labels, get_blank_id(model.config))
    scores = score_nodes(model, model.encoder_projector(hidden), labels)
    durations = model.config.durations if head_type == "tdt" else None
    return align_transducer(scores, durations)


def score_nodes(model: Any, encoder_states: Tensor, labels: list[int]) -> NodeScores:
    """Compute the log-probabilities at all nodes of the lattice of a transducer, block by block.

    Args:
        model: RNN-T or TDT model.
        encoder_states: (N, J) encoder frames, projected to the width of the joint network.
        labels: the U labels.

    Returns:
        The log-probabilities.
    """
    vocab_size, blank_id = model.config.vocab_size, get_blank_id(model.config)
    inputs = torch.tensor([[blank_id, *labels]], device=encoder_states.device)
    # (U + 1, J)
    predictor_states = model.decoder(inputs)[0]
    next_labels = inputs[0, 1:]
    positions = torch.arange(len(labels), device=encoder_states.device)
    num_outputs = model.joint.head.out_features
    block_size = max(1, BLOCK_BYTES // (4 * num_outputs * len(predictor_states)))
    blanks, label_scores, durations = [], [], []
    for block in encoder_states.split(block_size):
        # (frames, U + 1, V + D)
        logits = model.joint(predictor_states[None], block[:, None]).float()
        log_probs = logits[..., :vocab_size].log_softmax(-1)
        blanks.append(log_probs[..., blank_id].double().cpu().numpy())
        label_scores.append(log_probs[:, positions, next_labels].double().cpu().numpy())
        if num_outputs > vocab_size:
            durations.append(logits[..., vocab_size:].log_softmax(-1).double().cpu().numpy())
    blank = np.concatenate(blanks) if blanks else np.zeros((0, len(labels) + 1))
    label = np.concatenate(label_scores) if blanks else np.zeros((0, len(labels)))
    return NodeScores(blank, label, np.concatenate(durations) if durations else np.zeros((*blank.shape, 2)))


def restore_spelling(words: tuple[TimedText, ...], text: str) -> tuple[TimedText, ...]:
    """Give aligned words the spelling that they have in the text.

    The tokenizer can change the form of characters, such as full-width letters.

    Args:
        words: words from the tokens of the text.
        text: the text.

    Returns:
        The words with the spelling of the text; the same words if the numbers of words differ.
    """
    spellings = text.split()
    if len(spellings) != len(words):
        return words
    return tuple(
        TimedText(spelling, word.start, word.end, word.confidence)
        for spelling, word in zip(spellings, words, strict=True)
    )


__all__ = ["align"]

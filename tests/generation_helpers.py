"""Small models with random weights, and clips of noise, for the tests of `generate`."""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformers_parakeet import (
    ParakeetCTCConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetForTDT,
    ParakeetRNNTConfig,
    ParakeetTDTConfig,
)

VOCAB, BLANK, PAD, MELS = 40, 39, 2, 80
ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "subsampling_conv_channels": 8,
    "num_mel_bins": MELS,
}
SHARED = {
    "vocab_size": VOCAB,
    "blank_token_id": BLANK,
    "pad_token_id": PAD,
    "decoder_hidden_size": 24,
    "joint_hidden_size": 20,
    "max_symbols_per_step": 4,
    "encoder_config": ENCODER,
}
TRANSDUCERS = ["rnnt", "tdt", "hybrid_rnnt", "hybrid_tdt"]
HEADS = ["ctc", *TRANSDUCERS]
# durations of the tiny TDT models; 3 is missing
DURATIONS = [0, 1, 2, 4]
SECONDS = [1.0, 30.0, 2.3, 17.0, 4.4, 9.1, 1.6, 6.0]


def build(head: str) -> Any:
    """Return a small model with random weights."""
    torch.manual_seed(20)
    hybrid = {"ctc_head": head.startswith("hybrid")}
    if head == "ctc":
        return ParakeetForCTC(ParakeetCTCConfig(vocab_size=VOCAB, pad_token_id=BLANK, encoder_config=ENCODER)).eval()
    if head.endswith("rnnt"):
        return ParakeetForRNNT(ParakeetRNNTConfig(**SHARED, **hybrid)).eval()
    return ParakeetForTDT(ParakeetTDTConfig(**SHARED, **hybrid, durations=DURATIONS)).eval()


@cache
def tiny(head: str) -> Any:
    """Return a model whose scores vary as after training. The tests share it and must not change it."""
    model = build(head)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 and "norm" not in name:
                # Glorot initialisation: the scores depend on the audio and on the previous labels
                weight.normal_(0.0, (2.0 / (weight[0].numel() + weight.shape[0])) ** 0.5)
        last = model.ctc_head if head == "ctc" else model.joint.head
        last.weight.mul_(4.0)
        if head != "ctc":
            model.encoder_projector.weight.mul_(2.0)
        make_plausible(model, last.bias)
    return model


@torch.no_grad()
def make_plausible(model: Any, bias: Tensor) -> None:
    """Shift the biases: labels equally likely, the blank best on most frames, 10 % of the durations 0."""
    features, mask = batch_of([0, 2, 4])
    has_prefix = hasattr(model, "joint")
    prefix = {"decoder_input_ids": torch.tensor([[BLANK, 5, 17, 30]] * 3)} if has_prefix else {}
    scores = model(input_features=features, attention_mask=mask, **prefix).logits
    inside = torch.arange(scores.shape[1]) < model._get_subsampling_output_length(mask.sum(-1))[:, None]
    # (frames of all clips times prefixes, V + D)
    scores = scores[inside].reshape(-1, len(bias))
    shift = -scores.mean(0)

    def raise_to(first: int, last: int, column: int, share: float) -> None:
        others = (scores + shift)[:, first:last].index_fill(-1, torch.tensor([column - first]), -torch.inf).amax(-1)
        shift[column] = torch.quantile(others - scores[:, column], share)

    has_durations = len(bias) > VOCAB
    # without durations a frame emits labels until the blank is best
    raise_to(0, VOCAB, BLANK, 0.66 if has_durations or not has_prefix else 0.86)
    if has_durations:
        raise_to(VOCAB, len(bias), VOCAB, 0.1)
    bias += shift


@cache
def clip(index: int) -> Tensor:
    """Return features (T, F) of noise whose spectrum and loudness change twice a second."""
    rng = np.random.default_rng(index)
    pieces = []
    for _ in range(int(2 * SECONDS[index]) + 1):
        noise = rng.normal(size=8000)
        pieces.append(rng.uniform(0.01, 0.5) * np.convolve(noise, rng.normal(size=9), mode="same"))
    samples = np.concatenate(pieces)[: int(16000 * SECONDS[index])].astype(np.float32)
    batch = ParakeetFeatureExtractor(feature_size=MELS)([samples], sampling_rate=16000, return_tensors="pt")
    return batch["input_features"][0, : int(batch["attention_mask"].sum())]


def batch_of(indices: list[int], extra: int = 0) -> tuple[Tensor, Tensor]:
    """Return features (B, T, F) and mask (B, T) of clips, with `extra` more mel frames of padding than needed."""
    width = max(len(clip(index)) for index in indices) + extra
    # padding that is as large as speech
    features = torch.full((len(indices), width, MELS), 3.0)
    mask = torch.zeros(len(indices), width, dtype=torch.long)
    for row, index in enumerate(indices):
        features[row, : len(clip(index))] = clip(index)
        mask[row, : len(clip(index))] = 1
    return features, mask


def run(model: Any, features: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Any:
    """Generate and return the output object."""
    return model.generate(input_features=features, attention_mask=mask, return_dict_in_generate=True, **kwargs)

"""The CTC loss against path enumeration, torch, and numbers that NeMo computed."""

import json
import math

import pytest
import torch
from conftest import TESTS
from safetensors.torch import load_file
from torch.nn import functional as F

from transformers_parakeet.losses import ctc_loss

GOLDEN_CTC = TESTS / "golden" / "ctc"
VOCAB_SIZE, BLANK_ID = 4, 3
# float32 log-softmax before float64 sums; measured on losses of up to 40: 3e-7 relative
LOSS_TOLERANCE = {"rel": 3e-6, "abs": 3e-6}


@pytest.mark.parametrize("pad_id", [-100, 128])
def test_ctc_loss_equals_nemo(pad_id):
    expected = json.loads((GOLDEN_CTC / "expected.json").read_text())
    arrays = load_file(GOLDEN_CTC / "arrays.safetensors")
    nemo, blank_id = expected["ctc"]["loss"], expected["blank_id"]
    label_lengths = nemo["target_lengths"]
    labels = torch.full((len(label_lengths), max(label_lengths) + 1), pad_id)
    for clip, values in enumerate(nemo["labels"]):
        labels[clip, : label_lengths[clip]] = torch.tensor(values[: label_lengths[clip]])
    logits = arrays["ctc_log_probs"][nemo["rows"]].clone().requires_grad_()
    frame_lengths = torch.tensor(nemo["input_lengths"])
    for reduction in ("none", "sum", "mean", "mean_batch", "mean_volume"):
        loss = ctc_loss(logits, labels, frame_lengths, blank_id, reduction)
        # measured: 3e-7 relative
        torch.testing.assert_close(loss, torch.tensor(nemo[reduction]), rtol=2e-6, atol=0)
    ctc_loss(logits, labels, frame_lengths, blank_id, "sum").backward()
    # measured: 4.9e-5; torch in float64 differs from NeMo by 6.4e-5
    torch.testing.assert_close(logits.grad, arrays["ctc_loss.logits_grad_of_sum"], rtol=0, atol=1e-4)


def enumerate_ctc_paths(log_probs, labels):
    """Return the negative logarithm of the probability of all frame-by-frame paths that collapse to the labels."""
    num_frames, vocab_size = log_probs.shape
    probability = 0.0
    for code in range(vocab_size**num_frames):
        path = [code // vocab_size**frame % vocab_size for frame in range(num_frames)]
        collapsed = [token for i, token in enumerate(path) if token != BLANK_ID and (i == 0 or path[i - 1] != token)]
        if collapsed == labels:
            probability += math.exp(sum(float(log_probs[frame, token]) for frame, token in enumerate(path)))
    return -math.log(probability) if probability else math.inf


@pytest.mark.parametrize("labels", [[], [0], [2, 2], [0, 1, 2], [1, 1, 1]], ids=str)
def test_ctc_equals_the_sum_over_paths(labels):
    logits = 2 * torch.randn(1, 4, VOCAB_SIZE, generator=torch.Generator().manual_seed(2))
    expected = enumerate_ctc_paths(logits[0].double().log_softmax(-1), labels)
    # padding at any position
    padded = torch.tensor([[-100, BLANK_ID, *labels, BLANK_ID, -100]])
    losses = ctc_loss(logits, padded, torch.tensor([4]), BLANK_ID, "none", zero_infinity=False)
    assert losses.tolist() == pytest.approx([expected], **LOSS_TOLERANCE)


def test_ctc_reductions_and_empty_transcripts():
    logits = torch.randn(3, 9, VOCAB_SIZE, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([[0, 1, 2, 1], [2, -100, -100, -100], [-100, -100, -100, -100]])
    frame_lengths, label_lengths = torch.tensor([9, 5, 7]), torch.tensor([4, 1, 0])
    log_probs = logits.double().log_softmax(-1).transpose(0, 1)
    options = {"blank": BLANK_ID, "zero_infinity": True}
    torch_losses = {
        reduction: F.ctc_loss(
            log_probs, labels.clamp(min=0), frame_lengths, label_lengths, reduction=reduction, **options
        )
        for reduction in ("none", "sum", "mean")
    }
    for reduction, expected in torch_losses.items():
        loss = ctc_loss(logits, labels, frame_lengths, BLANK_ID, reduction).double()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    mean_batch = ctc_loss(logits, labels, frame_lengths, BLANK_ID, "mean_batch")
    assert float(mean_batch) == pytest.approx(float(torch_losses["none"].mean()))
    mean_volume = ctc_loss(logits, labels, frame_lengths, BLANK_ID, "mean_volume")
    assert float(mean_volume) == pytest.approx(float(torch_losses["sum"]) / 5)
    # a clip without labels has one path: blank in every frame
    without_labels = float(ctc_loss(logits, labels, frame_lengths, BLANK_ID, "none")[2])
    assert without_labels == pytest.approx(-float(log_probs[:7, 2, BLANK_ID].sum()), **LOSS_TOLERANCE)


def test_zero_infinity_decides_the_loss_of_an_impossible_transcript():
    logits = torch.randn(1, 3, VOCAB_SIZE, generator=torch.Generator().manual_seed(6)).requires_grad_()
    # two equal labels need a blank between them: these three labels need four frames
    labels = torch.tensor([[1, 1, 2]])
    loss = ctc_loss(logits, labels, torch.tensor([3]), BLANK_ID, "sum")
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert ctc_loss(logits, labels, torch.tensor([3]), BLANK_ID, "sum", zero_infinity=False).item() == math.inf


@pytest.mark.parametrize("label", [VOCAB_SIZE, 5000])
@pytest.mark.parametrize("column", [0, 1])
def test_ctc_refuses_labels_without_a_logit(label, column):
    logits, labels = torch.zeros(2, 6, VOCAB_SIZE), torch.tensor([[0, 1], [1, -100]])
    labels[1, column] = label
    with pytest.raises(ValueError, match=rf"labels must be ids below {VOCAB_SIZE}, got \[{label}\]"):
        ctc_loss(logits, labels, torch.tensor([6, 6]), BLANK_ID)


def test_ctc_avoids_cudnn_without_its_global_switch(monkeypatch):
    """cuDNN's loss takes int32 labels only: int64 labels avoid it without changing a setting that threads share."""
    calls = []

    def record_call(log_probs, targets, *args, **kwargs):
        """Record the types of the arguments, and call torch."""
        calls.append((torch.backends.cudnn.enabled, targets.dtype, args[0].dtype, args[1].dtype))
        return torch_ctc_loss(log_probs, targets, *args, **kwargs)

    torch_ctc_loss = F.ctc_loss
    monkeypatch.setattr(F, "ctc_loss", record_call)
    logits = torch.zeros(1, 6, VOCAB_SIZE)
    losses = [
        ctc_loss(logits, torch.tensor([[0, 1]], dtype=dtype), torch.tensor([6], dtype=dtype), BLANK_ID)
        for dtype in (torch.int32, torch.int64)
    ]
    assert losses[0] == losses[1]
    assert calls == [(True, torch.int64, torch.int64, torch.int64)] * 2

"""Checks the losses against path enumeration, float64 dynamic programmes, torch, and numbers that NeMo computed."""

import json
import math
from functools import cache

import pytest
import torch
from conftest import TESTS
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from transformers_parakeet.losses.transducer import (
    REDUCTIONS,
    compact_labels,
    ctc_loss,
    reduce_loss,
    rnnt_loss,
    tdt_loss,
)

GOLDEN = TESTS / "golden"
TRANSDUCERS = ["rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"]
VOCAB, BLANK = 4, 3
# float32 log-softmax before a float64 lattice; measured on values of up to 40: 3e-7 relative, gradients 2e-7 absolute
VALUE = {"rel": 3e-6, "abs": 3e-6}
GRADIENT = {"rtol": 0.0, "atol": 2e-6}


def random_lattice(seed: int, frames: int, labels: int, outputs: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Logits (B, N, U+1, V + D) and labels (B, U)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, frames, labels + 1, outputs, generator=generator, dtype=torch.double)
    return logits, torch.randint(BLANK, (batch, labels), generator=generator)


def enumerate_paths(
    logits: Tensor, targets: list[int], frames: int, durations: tuple[int, ...] | None, sigma: float
) -> tuple[float, int]:
    """Walk every path of one clip: the negative log of the sum of their probabilities, and how many there are.

    Args:
        logits: (N, U+1, V [+ D]) float64.
        targets: the labels.
        frames: valid frames.
        durations: of TDT; `None` for RNN-T, where a label stays and a blank moves one frame.
        sigma: subtracted from every token score.
    """
    tokens = logits[..., :VOCAB].log_softmax(-1) - sigma
    spans = logits[..., VOCAB:].log_softmax(-1)
    # (token is blank, frames it moves, index of its duration)
    if durations is None:
        arcs = [(True, 1, None), (False, 0, None)]
    else:
        arcs = [(is_blank, d, i) for i, d in enumerate(durations) for is_blank in (True, False) if d or not is_blank]
    total, count = 0.0, 0

    def walk(frame: int, label: int, score: float) -> None:
        nonlocal total, count
        for is_blank, move, index in arcs:
            if not is_blank and label == len(targets):
                continue
            token = BLANK if is_blank else targets[label]
            after = score + float(tokens[frame, label, token])
            after += 0.0 if index is None else float(spans[frame, label, index])
            if frame + move < frames:
                walk(frame + move, label + (not is_blank), after)
            elif frame + move == frames and is_blank and label == len(targets):
                total, count = total + math.exp(after), count + 1

    if frames:
        walk(0, 0, 0.0)
    return (-math.log(total) if total else math.inf), count


def test_paths_of_rnnt_are_as_many_as_counted():
    # T blanks, the last one at the end, among U labels: C(T - 1 + U, U)
    logits, labels = random_lattice(0, 4, 3, VOCAB)
    assert enumerate_paths(logits[0], labels[0].tolist(), 4, None, 0.0)[1] == math.comb(6, 3)


@pytest.mark.parametrize("labels", [0, 1, 2, 3])
@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_rnnt_equals_the_sum_over_paths(frames: int, labels: int):
    logits, targets = random_lattice(10 * frames + labels, frames, labels, VOCAB)
    truth, _ = enumerate_paths(logits[0], targets[0].tolist(), frames, None, 0.0)
    ours = rnnt_loss(logits.float(), targets, torch.tensor([frames]), torch.tensor([labels]), BLANK, "none")
    assert ours.tolist() == pytest.approx([truth], **VALUE)


DURATION_SETS = [(0, 1), (0, 1, 2), (0, 2), (1, 2), (0, 1, 3), (2, 0, 1), (0, 1, 2, 4, 8), (1,), (0, 3)]


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("durations", DURATION_SETS, ids=str)
def test_tdt_equals_the_sum_over_paths(durations: tuple[int, ...], sigma: float):
    seen = 0
    for frames in (1, 2, 3, 4):
        for labels in (0, 1, 2, 3):
            logits, targets = random_lattice(100 * frames + labels, frames, labels, VOCAB + len(durations))
            truth, paths = enumerate_paths(logits[0], targets[0].tolist(), frames, durations, sigma)
            ours = float(run_tdt(logits.float(), targets, [frames], [labels], durations, sigma)[0])
            if paths:
                assert ours == pytest.approx(truth, **VALUE)
            else:
                # no path lands on the end: as good as impossible
                assert ours > 1e20
            seen += paths > 0
    assert seen > 2


def run_tdt(
    logits: Tensor,
    targets: Tensor,
    frames: list[int],
    labels: list[int],
    durations: tuple[int, ...],
    sigma: float = 0.0,
    reduction: str = "none",
) -> Tensor:
    lengths = {"logit_lengths": torch.tensor(frames), "target_lengths": torch.tensor(labels)}
    tokens, spans = logits[..., :VOCAB], logits[..., VOCAB:]
    options = {"blank_token_id": BLANK, "durations": durations, "sigma": sigma, "reduction": reduction}
    return tdt_loss(tokens, spans, targets, **lengths, **options)


def float64_loss(
    logits: Tensor, targets: list[int], frames: int, durations: tuple[int, ...] | None, sigma: float
) -> Tensor:
    """The same sum as a recursion from the end, differentiable, in float64, one scalar at a time."""
    tokens = logits[..., :VOCAB].log_softmax(-1) - sigma
    spans = logits[..., VOCAB:].log_softmax(-1)
    never = torch.tensor(-math.inf, dtype=torch.double)

    def duration_score(frame: int, label: int, index: int) -> Tensor:
        return spans[frame, label, index] if durations else torch.zeros((), dtype=torch.double)

    @cache
    def rest(frame: int, label: int) -> Tensor:
        """Log-probability of all that can follow at this place."""
        if frame >= frames:
            return never
        ways = []
        for index, duration in enumerate(durations or (0, 1)):
            span = duration_score(frame, label, index)
            if duration and (durations or duration == 1):
                blank = tokens[frame, label, BLANK] + span
                done = frame + duration == frames and label == len(targets)
                ways.append(blank if done else blank + rest(frame + duration, label))
            if label < len(targets) and (durations or duration == 0):
                ways.append(tokens[frame, label, targets[label]] + span + rest(frame + duration, label + 1))
        ways = [way for way in ways if way > -math.inf]
        return torch.stack(ways).logsumexp(0) if ways else never

    return -rest(0, 0)


FRAMES, LABELS = [6, 3, 5, 1, 6], [4, 0, 7, 2, 1]


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (0, 1, 4), (3, 0, 1)], ids=str)
def test_values_and_gradients_of_a_ragged_batch(durations: tuple[int, ...] | None, sigma: float):
    # unequal lengths, an empty transcript, and more labels than frames
    outputs = VOCAB + len(durations or ())
    logits, targets = random_lattice(7, max(FRAMES), max(LABELS), outputs, batch=len(FRAMES))
    truth = logits.clone().requires_grad_()
    rows = [
        float64_loss(truth[i], targets[i, : LABELS[i]].tolist(), FRAMES[i], durations, sigma if durations else 0.0)
        for i in range(len(FRAMES))
    ]
    torch.stack(rows).sum().backward()
    ours = logits.float().requires_grad_()
    # what lies past a row's end must not matter
    poison = torch.zeros_like(ours)
    for i, (frames, labels) in enumerate(zip(FRAMES, LABELS, strict=True)):
        poison[i, frames:] = 50.0
        poison[i, :, labels + 1 :] = -50.0
    if durations is None:
        losses = rnnt_loss(ours + poison, targets, torch.tensor(FRAMES), torch.tensor(LABELS), BLANK, reduction="none")
    else:
        losses = run_tdt(ours + poison, targets, FRAMES, LABELS, durations, sigma)
    assert losses.tolist() == pytest.approx([row.item() for row in rows], **VALUE)
    losses.sum().backward()
    torch.testing.assert_close(ours.grad.double(), truth.grad, **GRADIENT)


def test_float64_programme_equals_the_paths():
    for durations in (None, (0, 1, 2), (0, 2, 3)):
        logits, targets = random_lattice(3, 4, 2, VOCAB + len(durations or ()))
        labels = targets[0].tolist()
        truth, _ = enumerate_paths(logits[0], labels, 4, durations, 0.05)
        assert float(float64_loss(logits[0], labels, 4, durations, 0.05)) == pytest.approx(truth, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores_are_summed_in_float32(dtype: torch.dtype):
    logits, targets = random_lattice(13, 4, 2, VOCAB + 3)
    rounded = logits.to(dtype)
    truth, _ = enumerate_paths(rounded[0].double(), targets[0].tolist(), 4, (0, 1, 2), 0.0)
    ours = run_tdt(rounded, targets, [4], [2], (0, 1, 2))
    assert ours.dtype == torch.float32
    assert ours.tolist() == pytest.approx([truth], **VALUE)


def golden(name: str) -> tuple[dict, dict[str, Tensor]]:
    folder = GOLDEN / name
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "arrays.safetensors")


def golden_loss(name: str, key: str, reduction: str, logits: Tensor) -> Tensor:
    expected, _ = golden(name)
    grid, blank = expected["transducer"]["grid"], expected["blank_id"]
    lengths = {
        "logit_lengths": torch.tensor(grid["input_lengths"]),
        "target_lengths": torch.tensor(grid["target_lengths"]),
        "blank_token_id": blank,
        "reduction": reduction,
    }
    tokens, spans, labels = logits[..., : blank + 1], logits[..., blank + 1 :], torch.tensor(grid["labels"])
    if not key.startswith("tdt"):
        return rnnt_loss(tokens, labels, **lengths)
    sigma = float(key.removeprefix("tdt_sigma"))
    return tdt_loss(tokens, spans, labels, durations=expected["model"]["durations"], sigma=sigma, **lengths)


GOLDEN_CASES = [("rnnt", "rnnt")] + [
    (name, key) for name in TRANSDUCERS[1:] for key in ("tdt_sigma0", "tdt_sigma0.05", "rnnt_on_token_logits")
]


@pytest.mark.parametrize(("name", "key"), GOLDEN_CASES)
def test_transducer_losses_equal_nemo(name: str, key: str):
    expected, arrays = golden(name)
    for reduction in REDUCTIONS:
        ours = golden_loss(name, key, reduction, arrays["joint_logits"])
        # measured: 2e-7 relative, where NeMo computes in float32
        torch.testing.assert_close(
            ours, torch.tensor(expected["transducer"]["loss"][key][reduction]), rtol=2e-6, atol=0
        )


@pytest.mark.parametrize(("name", "key"), GOLDEN_CASES)
def test_transducer_gradients_equal_nemo(name: str, key: str):
    _, arrays = golden(name)
    logits = arrays["joint_logits"].clone().requires_grad_()
    golden_loss(name, key, "sum", logits).backward()
    truth = arrays[f"loss.{key}.logits_grad_of_sum"]
    # measured: 1.3e-5; NOTES.md section 9 gives 3e-5 as NeMo's own distance from float64
    torch.testing.assert_close(logits.grad[..., : truth.shape[-1]], truth, rtol=0, atol=5e-5)
    assert not logits.grad[..., truth.shape[-1] :].any()


def test_rnnt_loss_equals_nemos_numba_kernel():
    expected, arrays = golden("rnnt")
    ours = golden_loss("rnnt", "rnnt", "none", arrays["joint_logits"])
    # measured: 2e-7 relative
    assert ours.tolist() == pytest.approx(expected["transducer"]["loss"]["rnnt_nemo_numba_cpu"], rel=2e-6)


def test_fastemit_equals_nemos_numba_kernel():
    # NeMo 3.0.0, RNNTLossNumba(fastemit_lambda=0.25) on the scores of the golden file, on a CPU: losses, gradient of
    # their sum weighted by cos(0), cos(1), ... and its absolute sum, per clip
    losses = [121.56846618652344, 74.39897918701172]
    weighted, absolute = [-0.9327284820974842, 1.0816713695953377], [17.350650750472212, 11.70567098253673]
    expected, arrays = golden("rnnt")
    grid, logits = expected["transducer"]["grid"], arrays["joint_logits"].clone().requires_grad_()
    lengths = torch.tensor(grid["input_lengths"]), torch.tensor(grid["target_lengths"])
    labels = torch.tensor(grid["labels"])
    ours = rnnt_loss(logits, labels, *lengths, expected["blank_id"], "none", fastemit_lambda=0.25)
    # NeMo's value is scaled like its gradients; ours stays the negative log-likelihood
    assert (1.25 * ours).tolist() == pytest.approx(losses, rel=2e-6)
    ours.sum().backward()
    gradient = logits.grad.double().flatten(1)
    # measured: 7e-6 and 8e-6 relative; NOTES.md section 9 gives 3e-5 as NeMo's own distance from float64
    assert (gradient * torch.arange(gradient.shape[1]).double().cos()).sum(1).tolist() == pytest.approx(
        weighted, abs=5e-5
    )
    assert gradient.abs().sum(1).tolist() == pytest.approx(absolute, rel=5e-5)


@pytest.mark.parametrize("pad", [-100, 128])
def test_ctc_loss_equals_nemo(pad: int):
    expected, arrays = golden("ctc")
    truth, blank = expected["ctc"]["loss"], expected["blank_id"]
    lengths = truth["target_lengths"]
    labels = torch.full((len(lengths), max(lengths) + 1), pad)
    for row, values in enumerate(truth["labels"]):
        labels[row, : lengths[row]] = torch.tensor(values[: lengths[row]])
    scores = arrays["ctc_log_probs"][truth["rows"]].clone().requires_grad_()
    frames = torch.tensor(truth["input_lengths"])
    for reduction in ("none", "sum", "mean", "mean_batch", "mean_volume"):
        ours = ctc_loss(scores, labels, frames, blank, reduction)
        # measured: 3e-7 relative
        torch.testing.assert_close(ours, torch.tensor(truth[reduction]), rtol=2e-6, atol=0)
    ctc_loss(scores, labels, frames, blank, "sum").backward()
    # measured: 4.9e-5; torch in float64 is 6.4e-5 away from NeMo
    torch.testing.assert_close(scores.grad, arrays["ctc_loss.logits_grad_of_sum"], rtol=0, atol=1e-4)


def ctc_by_paths(log_probs: Tensor, labels: list[int]) -> float:
    """Sum the probabilities of all frame-wise paths that collapse to the labels."""
    total, (frames, vocab) = 0.0, log_probs.shape
    for code in range(vocab**frames):
        path = [code // vocab**frame % vocab for frame in range(frames)]
        collapsed = [token for i, token in enumerate(path) if token != BLANK and (i == 0 or path[i - 1] != token)]
        if collapsed == labels:
            total += math.exp(sum(float(log_probs[frame, token]) for frame, token in enumerate(path)))
    return -math.log(total) if total else math.inf


@pytest.mark.parametrize("labels", [[], [0], [2, 2], [0, 1, 2], [1, 1, 1]], ids=str)
def test_ctc_equals_the_sum_over_paths(labels: list[int]):
    logits = 2 * torch.randn(1, 4, VOCAB, generator=torch.Generator().manual_seed(2))
    truth = ctc_by_paths(logits[0].double().log_softmax(-1), labels)
    # pads stand anywhere
    padded = torch.tensor([[-100, BLANK, *labels, BLANK, -100]])
    ours = ctc_loss(logits, padded, torch.tensor([4]), BLANK, "none", zero_infinity=False)
    assert ours.tolist() == pytest.approx([truth], **VALUE)


def test_ctc_reductions_and_empty_transcripts():
    logits = torch.randn(3, 9, VOCAB, generator=torch.Generator().manual_seed(4))
    labels = torch.tensor([[0, 1, 2, 1], [2, -100, -100, -100], [-100, -100, -100, -100]])
    frames, counts = torch.tensor([9, 5, 7]), torch.tensor([4, 1, 0])
    log_probs = logits.double().log_softmax(-1).transpose(0, 1)
    options = {"blank": BLANK, "zero_infinity": True}
    stock = {
        kind: F.ctc_loss(log_probs, labels.clamp(min=0), frames, counts, reduction=kind, **options)
        for kind in ("none", "sum", "mean")
    }
    for kind, truth in stock.items():
        torch.testing.assert_close(ctc_loss(logits, labels, frames, BLANK, kind).double(), truth, rtol=1e-6, atol=1e-6)
    assert float(ctc_loss(logits, labels, frames, BLANK, "mean_batch")) == pytest.approx(float(stock["none"].mean()))
    assert float(ctc_loss(logits, labels, frames, BLANK, "mean_volume")) == pytest.approx(float(stock["sum"]) / 5)
    # a clip without words is blank on every frame
    silent = float(ctc_loss(logits, labels, frames, BLANK, "none")[2])
    assert silent == pytest.approx(-float(log_probs[:7, 2, BLANK].sum()), **VALUE)


def test_ctc_counts_an_impossible_transcript_as_asked():
    logits = torch.randn(1, 3, VOCAB, generator=torch.Generator().manual_seed(6)).requires_grad_()
    # two equal labels need a blank between them: four frames for three labels of which two repeat
    labels = torch.tensor([[1, 1, 2]])
    loss = ctc_loss(logits, labels, torch.tensor([3]), BLANK, "sum")
    loss.backward()
    assert loss.item() == 0.0
    assert not logits.grad.any()
    assert ctc_loss(logits, labels, torch.tensor([3]), BLANK, "sum", zero_infinity=False).item() == math.inf


def test_reductions_by_hand():
    losses, counts = torch.tensor([6.0, 8.0, 5.0]), torch.tensor([3, 2, 0])
    assert reduce_loss(losses, counts, "none").tolist() == [6.0, 8.0, 5.0]
    assert float(reduce_loss(losses, counts, "sum")) == 19.0
    # a clip without labels counts as one label
    assert float(reduce_loss(losses, counts, "mean")) == pytest.approx((2 + 4 + 5) / 3)
    assert float(reduce_loss(losses, counts, "mean_batch")) == pytest.approx(19 / 3)
    assert float(reduce_loss(losses, counts, "mean_volume")) == pytest.approx(19 / 5)
    with pytest.raises(ValueError, match="must be one of none, sum, mean, mean_batch, mean_volume, got 'average'"):
        reduce_loss(losses, counts, "average")


def test_compact_labels_keeps_the_order():
    labels = torch.tensor([[-100, 5, -100, 3, 5], [1, 2, 3, 4, 5], [-100] * 5])
    rows, lengths = compact_labels(labels, labels >= 0)
    assert rows.tolist() == [[5, 3, 5, 0, 0], [1, 2, 3, 4, 5], [0] * 5]
    assert lengths.tolist() == [3, 5, 0]


@pytest.mark.parametrize("label", [VOCAB, 5000])
@pytest.mark.parametrize("place", [0, 1])
def test_ctc_refuses_labels_that_have_no_score(label, place):
    logits, labels = torch.zeros(2, 6, VOCAB), torch.tensor([[0, 1], [1, -100]])
    labels[1, place] = label
    with pytest.raises(ValueError, match=rf"labels must be ids below {VOCAB}, got \[{label}\]"):
        ctc_loss(logits, labels, torch.tensor([6, 6]), BLANK)


def test_ctc_leaves_the_global_switch_of_cudnn_alone(monkeypatch):
    """cuDNN's own loss takes int32 labels only, so int64 labels avoid it without a switch that threads share."""
    seen = []

    def watched(log_probs, targets, *args, **kwargs):
        seen.append((torch.backends.cudnn.enabled, targets.dtype, args[0].dtype, args[1].dtype))
        return plain(log_probs, targets, *args, **kwargs)

    plain = F.ctc_loss
    monkeypatch.setattr(F, "ctc_loss", watched)
    logits = torch.zeros(1, 6, VOCAB)
    losses = [
        ctc_loss(logits, torch.tensor([[0, 1]], dtype=dtype), torch.tensor([6], dtype=dtype), BLANK)
        for dtype in (torch.int32, torch.int64)
    ]
    assert losses[0] == losses[1]
    assert seen == [(True, torch.int64, torch.int64, torch.int64)] * 2

"""The losses of given logits against path enumeration, the plain reference, finite differences, and NeMo's numbers."""

import inspect
import json
import math

import pytest
import torch
from conftest import TESTS
from loss_helpers import BLANK_ID, VOCAB_SIZE, RandomBatch, enumerate_paths, joint_logits
from safetensors.torch import load_file
from torch import Tensor

from transformers_parakeet.losses import REDUCTIONS, TransducerLoss, rnnt_loss, tdt_loss, transducer_loss
from transformers_parakeet.losses.reference import transducer_loss_reference

GOLDEN = TESTS / "golden"
TRANSDUCERS = ["rnnt", "tdt", "hybrid_tdt_ctc", "tdt_agg_tokenizer"]
DURATION_SETS = [(0, 1), (0, 1, 2), (0, 2), (1, 2), (0, 1, 3), (2, 0, 1), (0, 1, 2, 4, 8), (1,), (0, 3)]
# float32 log-softmax before float64 sums; measured on losses of up to 40: 3e-7 relative, gradients 2e-7 absolute
LOSS_TOLERANCE = {"rel": 3e-6, "abs": 3e-6}
GRADIENT_TOLERANCE = {"rtol": 0.0, "atol": 2e-6}


def random_logits(seed: int, num_frames: int, num_labels: int, num_outputs: int, batch: int = 1):
    """Return float64 logits (B, T, U+1, V + D) and labels (B, U)."""
    generator = torch.Generator().manual_seed(seed)
    shape = batch, num_frames, num_labels + 1, num_outputs
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.double)
    return logits, torch.randint(BLANK_ID, (batch, num_labels), generator=generator)


def tdt_losses(
    logits: Tensor,
    labels: Tensor,
    frame_lengths: list[int],
    label_lengths: list[int],
    durations: tuple[int, ...],
    sigma: float = 0.0,
) -> Tensor:
    """Return (B,) TDT losses of logits (B, T, U+1, V + D)."""
    return tdt_loss(
        logits[..., :VOCAB_SIZE],
        logits[..., VOCAB_SIZE:],
        labels,
        torch.tensor(frame_lengths),
        torch.tensor(label_lengths),
        BLANK_ID,
        durations,
        sigma,
        reduction="none",
    )


def test_enumeration_finds_the_known_number_of_rnnt_paths():
    # T blanks, the last one at the end, among U labels: C(T - 1 + U, U)
    logits, labels = random_logits(0, 4, 3, VOCAB_SIZE)
    assert enumerate_paths(logits[0], labels[0].tolist(), BLANK_ID, None, 0.0)[1] == math.comb(6, 3)


@pytest.mark.parametrize("num_labels", [0, 1, 2, 3])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 4])
def test_rnnt_equals_the_sum_over_paths(num_frames, num_labels):
    logits, labels = random_logits(10 * num_frames + num_labels, num_frames, num_labels, VOCAB_SIZE)
    expected, _ = enumerate_paths(logits[0], labels[0].tolist(), BLANK_ID, None, 0.0)
    lengths = torch.tensor([num_frames]), torch.tensor([num_labels])
    losses = rnnt_loss(logits.float(), labels, *lengths, BLANK_ID, "none")
    assert losses.tolist() == pytest.approx([expected], **LOSS_TOLERANCE)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("durations", DURATION_SETS, ids=str)
def test_tdt_equals_the_sum_over_paths(durations, sigma):
    num_possible = 0
    for num_frames in (1, 2, 3, 4):
        for num_labels in (0, 1, 2, 3):
            seed = 100 * num_frames + num_labels
            logits, labels = random_logits(seed, num_frames, num_labels, VOCAB_SIZE + len(durations))
            expected, num_paths = enumerate_paths(logits[0], labels[0].tolist(), BLANK_ID, durations, sigma)
            loss = float(tdt_losses(logits.float(), labels, [num_frames], [num_labels], durations, sigma))
            assert loss == (pytest.approx(expected, **LOSS_TOLERANCE) if num_paths else math.inf)
            num_possible += num_paths > 0
    assert num_possible > 2


def test_reference_equals_the_sum_over_paths():
    for durations in (None, (0, 1, 2), (0, 2, 3)):
        logits, labels = random_logits(3, 4, 2, VOCAB_SIZE + len(durations or ()))
        sigma = 0.0 if durations is None else 0.05
        expected, _ = enumerate_paths(logits[0], labels[0].tolist(), BLANK_ID, durations, sigma)
        loss = transducer_loss_reference(logits[0], labels[0].tolist(), BLANK_ID, durations, sigma)
        assert float(loss) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.0, 0.05])
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (0, 1, 4), (3, 0, 1)], ids=str)
def test_losses_and_gradients_of_a_padded_batch(durations, sigma):
    # different lengths, an empty transcript, and more labels than frames
    frame_lengths, label_lengths = [6, 3, 5, 1, 6], [4, 0, 7, 2, 1]
    num_outputs = VOCAB_SIZE + len(durations or ())
    logits, labels = random_logits(7, max(frame_lengths), max(label_lengths), num_outputs, batch=5)
    expected_logits = logits.clone().requires_grad_()
    expected = []
    for clip, (num_frames, num_labels) in enumerate(zip(frame_lengths, label_lengths, strict=True)):
        clip_logits = expected_logits[clip, :num_frames, : num_labels + 1]
        clip_labels = labels[clip, :num_labels].tolist()
        expected.append(transducer_loss_reference(clip_logits, clip_labels, BLANK_ID, durations, sigma))
    torch.stack(expected).sum().backward()
    float32_logits = logits.float().requires_grad_()
    # large values in the padding
    padding = torch.zeros_like(float32_logits)
    for clip, (num_frames, num_labels) in enumerate(zip(frame_lengths, label_lengths, strict=True)):
        padding[clip, num_frames:] = 50.0
        padding[clip, :, num_labels + 1 :] = -50.0
    padded_logits = float32_logits + padding
    if durations is None:
        lengths = torch.tensor(frame_lengths), torch.tensor(label_lengths)
        losses = rnnt_loss(padded_logits, labels, *lengths, BLANK_ID, reduction="none")
    else:
        losses = tdt_losses(padded_logits, labels, frame_lengths, label_lengths, durations, sigma)
    assert losses.tolist() == pytest.approx([loss.item() for loss in expected], **LOSS_TOLERANCE)
    losses.sum().backward()
    torch.testing.assert_close(float32_logits.grad.double(), expected_logits.grad, **GRADIENT_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_normalised_in_float32(dtype):
    logits, labels = random_logits(13, 4, 2, VOCAB_SIZE + 3)
    half_logits = logits.to(dtype)
    expected, _ = enumerate_paths(half_logits[0].double(), labels[0].tolist(), BLANK_ID, (0, 1, 2), 0.0)
    losses = tdt_losses(half_logits, labels, [4], [2], (0, 1, 2))
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx([expected], **LOSS_TOLERANCE)


@pytest.mark.parametrize("durations", [None, (0, 1, 3)], ids=str)
def test_gradients_of_logits_equal_finite_differences(durations):
    batch = RandomBatch(6, durations, (2, 4, 2))
    logits = joint_logits(*batch.joint_inputs()).detach()
    token_logits, duration_logits = (
        part.requires_grad_() for part in logits.split([VOCAB_SIZE, len(durations or ())], -1)
    )

    def rnnt(token_logits):
        """Return (B,) RNN-T losses."""
        return rnnt_loss(token_logits, batch.labels, *batch.lengths, BLANK_ID, "none")

    def tdt(token_logits, duration_logits):
        """Return (B,) TDT losses."""
        lengths = batch.lengths
        return tdt_loss(token_logits, duration_logits, batch.labels, *lengths, BLANK_ID, durations, 0.1, "none")

    if durations is None:
        assert torch.autograd.gradcheck(rnnt, token_logits)
    else:
        assert torch.autograd.gradcheck(tdt, (token_logits, duration_logits))


def test_padding_of_logits_is_never_read():
    batch = RandomBatch(12, None, (2, 6, 4))
    batch.frame_lengths, batch.label_lengths = [6, 3], [2, 4]
    clean = joint_logits(*batch.joint_inputs(torch.float)).detach()
    poisoned = clean.clone()
    poisoned[0, :, 3:], poisoned[1, 3:] = math.nan, math.nan
    results = []
    for logits in (clean.requires_grad_(), poisoned.requires_grad_()):
        losses = rnnt_loss(logits, batch.labels, *batch.lengths, BLANK_ID, "none")
        losses.sum().backward()
        results.append((losses, logits.grad))
    (clean_losses, clean_gradient), (poisoned_losses, poisoned_gradient) = results
    assert torch.equal(clean_losses, poisoned_losses)
    assert torch.equal(clean_gradient, poisoned_gradient)
    assert not poisoned_gradient[1, 3:].any()


def test_logits_of_minus_infinity_remove_paths():
    batch, durations = RandomBatch(26, (0, 1, 2), (1, 5, 2)), (0, 1, 2)
    labels = batch.labels[0].tolist()
    logits = joint_logits(*batch.joint_inputs()).detach()
    token_logits, duration_logits = logits[..., :VOCAB_SIZE].clone(), logits[..., VOCAB_SIZE:].clone()
    unused_token = next(token for token in range(BLANK_ID) if token not in labels)
    token_logits[..., unused_token] = -math.inf
    duration_logits[..., 1] = -math.inf
    arguments = batch.labels, *batch.lengths, BLANK_ID, durations
    masked_logits = torch.cat([token_logits, duration_logits], -1)[0]
    expected = transducer_loss_reference(masked_logits, labels, BLANK_ID, durations)
    token_logits.requires_grad_()
    loss = tdt_loss(token_logits, duration_logits, *arguments, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    loss.backward()
    assert token_logits.grad.isfinite().all()
    impossible_logits = token_logits.detach().clone()
    impossible_logits[..., labels[0]] = -math.inf
    assert tdt_loss(impossible_logits, duration_logits, *arguments, reduction="sum") == math.inf


def test_the_layer_equals_the_function_and_has_no_state():
    batch = RandomBatch(27, (0, 1, 2), (2, 5, 3))
    layer = TransducerLoss()
    attributes = dict(vars(layer))
    inputs = batch.joint_inputs()
    arguments = batch.labels, *batch.lengths, BLANK_ID
    loss = layer(*inputs, *arguments, durations=batch.durations, sigma=0.05, reduction="mean")
    assert torch.equal(loss, batch.fused_losses(inputs, sigma=0.05, reduction="mean"))
    assert vars(layer) == attributes
    assert not list(layer.parameters())
    assert not layer.state_dict()
    # a kernel is compared with the layer by these parameters
    assert inspect.signature(layer.forward) == inspect.signature(transducer_loss)


def read_golden(name):
    """Return NeMo's expected values and arrays of a golden file."""
    folder = GOLDEN / name
    return json.loads((folder / "expected.json").read_text()), load_file(folder / "arrays.safetensors")


def loss_of_golden_logits(name, loss_name, reduction, logits):
    """Compute one of our losses on NeMo's logits; `loss_name` is a key of NeMo's losses, such as `tdt_sigma0.05`."""
    expected, _ = read_golden(name)
    grid, blank_id = expected["transducer"]["grid"], expected["blank_id"]
    arguments = {
        "logit_lengths": torch.tensor(grid["input_lengths"]),
        "target_lengths": torch.tensor(grid["target_lengths"]),
        "blank_token_id": blank_id,
        "reduction": reduction,
    }
    labels = torch.tensor(grid["labels"])
    token_logits, duration_logits = logits[..., : blank_id + 1], logits[..., blank_id + 1 :]
    if not loss_name.startswith("tdt"):
        return rnnt_loss(token_logits, labels, **arguments)
    sigma, durations = float(loss_name.removeprefix("tdt_sigma")), expected["model"]["durations"]
    return tdt_loss(token_logits, duration_logits, labels, durations=durations, sigma=sigma, **arguments)


GOLDEN_LOSSES = [("rnnt", "rnnt")] + [
    (name, loss_name)
    for name in TRANSDUCERS[1:]
    for loss_name in ("tdt_sigma0", "tdt_sigma0.05", "rnnt_on_token_logits")
]


@pytest.mark.parametrize(("name", "loss_name"), GOLDEN_LOSSES)
def test_transducer_losses_equal_nemo(name, loss_name):
    expected, arrays = read_golden(name)
    for reduction in REDUCTIONS:
        loss = loss_of_golden_logits(name, loss_name, reduction, arrays["joint_logits"])
        nemo = torch.tensor(expected["transducer"]["loss"][loss_name][reduction])
        # measured: 2e-7 relative, where NeMo computes in float32
        torch.testing.assert_close(loss, nemo, rtol=2e-6, atol=0)


@pytest.mark.parametrize(("name", "loss_name"), GOLDEN_LOSSES)
def test_transducer_gradients_equal_nemo(name, loss_name):
    _, arrays = read_golden(name)
    logits = arrays["joint_logits"].clone().requires_grad_()
    loss_of_golden_logits(name, loss_name, "sum", logits).backward()
    nemo = arrays[f"loss.{loss_name}.logits_grad_of_sum"]
    # measured: 1.3e-5; NOTES.md section 9 gives 3e-5 as the distance of NeMo from float64
    torch.testing.assert_close(logits.grad[..., : nemo.shape[-1]], nemo, rtol=0, atol=5e-5)
    assert not logits.grad[..., nemo.shape[-1] :].any()


def test_rnnt_loss_equals_nemos_numba_kernel():
    expected, arrays = read_golden("rnnt")
    losses = loss_of_golden_logits("rnnt", "rnnt", "none", arrays["joint_logits"])
    # measured: 2e-7 relative
    assert losses.tolist() == pytest.approx(expected["transducer"]["loss"]["rnnt_nemo_numba_cpu"], rel=2e-6)


def test_fastemit_equals_nemos_numba_kernel():
    # NeMo 3.0.0, RNNTLossNumba(fastemit_lambda=0.25) on the logits of the golden file, on a CPU: losses, and for the
    # gradient of each clip its sum weighted by cos(0), cos(1), ... and its absolute sum
    nemo_losses = [121.56846618652344, 74.39897918701172]
    nemo_weighted_sums, nemo_absolute_sums = (
        [-0.9327284820974842, 1.0816713695953377],
        [17.350650750472212, 11.70567098253673],
    )
    expected, arrays = read_golden("rnnt")
    grid, logits = expected["transducer"]["grid"], arrays["joint_logits"].clone().requires_grad_()
    lengths = torch.tensor(grid["input_lengths"]), torch.tensor(grid["target_lengths"])
    labels = torch.tensor(grid["labels"])
    losses = rnnt_loss(logits, labels, *lengths, expected["blank_id"], "none", fastemit_lambda=0.25)
    # NeMo scales its loss like the gradients; our loss stays the negative log-likelihood
    assert (1.25 * losses).tolist() == pytest.approx(nemo_losses, rel=2e-6)
    losses.sum().backward()
    gradient = logits.grad.double().flatten(1)
    weights = torch.arange(gradient.shape[1]).double().cos()
    # measured: 7e-6 and 8e-6 relative; NOTES.md section 9 gives 3e-5 as the distance of NeMo from float64
    assert (gradient * weights).sum(1).tolist() == pytest.approx(nemo_weighted_sums, abs=5e-5)
    assert gradient.abs().sum(1).tolist() == pytest.approx(nemo_absolute_sums, rel=5e-5)

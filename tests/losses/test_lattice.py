"""The sums over the paths of a lattice, and the posteriors of its arcs."""

import math

import pytest
import torch
from loss_helpers import BLANK_ID, VOCAB_SIZE, RandomBatch, gradients, joint_logits, relative_error

from transformers_parakeet.losses.chunked_joint import locate_inputs
from transformers_parakeet.losses.lattice import NodeLogProbs, TransducerOptions, build_lattice
from transformers_parakeet.losses.path_sums import IncomingArcs, compute_log_alpha, compute_losses_and_posteriors


@pytest.fixture
def nan_in_new_memory():
    """Let torch fill new memory with NaN, so that reading a value before it is written changes the result."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(was_deterministic)


def lattice_of(batch, sigma=0.0, fastemit_lambda=0.0):
    """Build the lattices of a random batch."""
    options = TransducerOptions(BLANK_ID, batch.durations, sigma, fastemit_lambda)
    shape = *batch.values[0].shape[:2], batch.values[1].shape[1]
    return build_lattice(shape, VOCAB_SIZE, batch.labels, *batch.lengths, options)


def node_log_probs(batch, lattice):
    """Return float64 log-probabilities of the valid nodes of a random batch."""
    logits = joint_logits(*batch.joint_inputs()).detach().flatten(0, 2)[lattice.nodes]
    token_log_probs = logits[:, :VOCAB_SIZE].log_softmax(-1)
    next_labels = locate_inputs(lattice, lattice.nodes).next_labels
    label = token_log_probs.gather(1, next_labels[:, None])[:, 0]
    durations = None if batch.durations is None else logits[:, VOCAB_SIZE:].log_softmax(-1)
    return NodeLogProbs(token_log_probs[:, BLANK_ID].clone(), label, durations)


@pytest.mark.parametrize(
    ("num_frames", "num_labels"), [(1, 1), (1, 63), (63, 1), (63, 21), (500, 1), (1, 500), (63, 0)]
)
@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4)], ids=str)
def test_losses_and_gradients_equal_the_reference_at_odd_sizes(num_frames, num_labels, durations, nan_in_new_memory):
    batch = RandomBatch(num_frames + num_labels, durations, (2, num_frames, num_labels))
    inputs = batch.joint_inputs()
    expected = batch.reference_losses(inputs, sigma=0.05, fastemit_lambda=0.1)
    expected_gradients = gradients(expected, inputs)
    losses = {
        "one chunk": batch.fused_losses(inputs, sigma=0.05, fastemit_lambda=0.1),
        "many chunks": batch.fused_losses(inputs, sigma=0.05, fastemit_lambda=0.1, workspace_bytes=200_000),
        "logits": batch.logits_losses(inputs, sigma=0.05, fastemit_lambda=0.1),
    }
    for name, values in losses.items():
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        # measured: 2e-11 with 500 labels, where the losses are up to 20000 and float64 rounds them to 4e-12
        assert relative_error(gradients(values, inputs), expected_gradients) < 1e-10, name


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4), (2, 0, 1), (1, 2), (0, 1, 1)], ids=str)
def test_posteriors_are_the_derivatives_of_the_log_likelihood(durations):
    """A finite difference of each log-probability gives the posterior of its arcs."""
    batch = RandomBatch(31, durations, (2, 6, 3))
    lattice = lattice_of(batch, sigma=0.05)
    log_probs = node_log_probs(batch, lattice)
    _, posteriors = compute_losses_and_posteriors(lattice, log_probs)
    step = 1e-6
    for name in ("blank", "label") if durations is None else ("blank", "label", "durations"):
        values, posterior = getattr(log_probs, name), getattr(posteriors, name)
        for index in range(0, values.numel(), 5):
            changes = torch.zeros(values.numel(), dtype=torch.double)
            changes[index] = step
            likelihoods = []
            for sign in (1, -1):
                changed = {**vars(log_probs), name: values + sign * changes.view_as(values)}
                losses, _ = compute_losses_and_posteriors(lattice, NodeLogProbs(**changed))
                likelihoods.append(-losses[losses.isfinite()].sum().item())
            derivative = (likelihoods[0] - likelihoods[1]) / (2 * step)
            # measured: 2e-9
            assert derivative == pytest.approx(float(posterior.flatten()[index]), abs=1e-7)


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4)], ids=str)
def test_posteriors_count_the_tokens_of_each_clip(durations):
    """Every path emits all labels; an RNN-T path has one blank per frame, and TDT durations add up to the frames."""
    batch = RandomBatch(32, durations, (3, 8, 4))
    lattice = lattice_of(batch)
    _, posteriors = compute_losses_and_posteriors(lattice, node_log_probs(batch, lattice))
    _, num_frames, num_columns = lattice.grid_shape
    clips = lattice.nodes // (num_frames * num_columns)
    for clip, (clip_frames, clip_labels) in enumerate(zip(batch.frame_lengths, batch.label_lengths, strict=True)):
        in_clip = clips == clip
        assert float(posteriors.label[in_clip].sum()) == pytest.approx(clip_labels, abs=1e-9)
        arc_durations = torch.tensor(lattice.options.arc_durations, dtype=torch.double)
        advanced = posteriors.durations[in_clip].sum(0) @ arc_durations
        assert float(advanced) == pytest.approx(clip_frames, rel=1e-9)
        if durations is None:
            assert float(posteriors.blank[in_clip].sum()) == pytest.approx(clip_frames, rel=1e-9)


def test_forward_recursion_of_a_lattice_computed_by_hand():
    # two frames and one label, RNN-T: log-probabilities of the arcs that enter each node
    moving = torch.full((3, 1, 1, 2, 2), -math.inf, dtype=torch.double)
    moving[1, 0, 0, 1] = torch.tensor([0.5, 0.25], dtype=torch.double).log()
    moving[2, 0, 0, 1] = torch.tensor([0.5, 0.5], dtype=torch.double).log()
    staying = torch.full((3, 1, 2), -math.inf, dtype=torch.double)
    staying[:2, 0, 1] = torch.tensor([0.5, 0.25], dtype=torch.double).log()
    log_alpha = compute_log_alpha(IncomingArcs(torch.tensor([1]), moving, staying))
    # alpha(0, 1) = 1/2; alpha(1, 0) = 1/2, alpha(1, 1) = 1/2 * 1/4 + 1/2 * 1/4; alpha(2, 1) = 1/4 * 1/2
    expected = torch.tensor([[1, 1 / 2], [1 / 2, 1 / 4], [1 / 4, 1 / 8]], dtype=torch.double)
    # no label enters frame 2: a running sum of -1e7 leaves 9 decimals there
    torch.testing.assert_close(log_alpha[:, 0].exp(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels": torch.zeros(2, 4, dtype=torch.long)},
            r"one column fewer than the predictor states, got \(2, 4\)",
        ),
        ({"labels": torch.full((2, 3), BLANK_ID)}, r"other than the blank \(5\), got \[5\]"),
        ({"labels": torch.full((2, 3), VOCAB_SIZE)}, r"ids from 0 to 6 .* got \[7\]"),
        ({"labels": torch.full((2, 3), -100)}, r"ids from 0 to 6 .* got \[-100\]"),
        ({"frame_lengths": [6, 3]}, r"`frame_lengths` must be 2 numbers from 0 to 5, got \[6, 3\]"),
        ({"label_lengths": [1, 4]}, r"`label_lengths` must be 2 numbers from 0 to 3, got \[1, 4\]"),
    ],
)
def test_labels_and_lengths_that_do_not_fit_are_refused(changes, message):
    batch = RandomBatch(28, (0, 1, 2), (2, 5, 3))
    batch.frame_lengths, batch.label_lengths = [5, 3], [3, 2]
    vars(batch).update(changes)
    with pytest.raises(ValueError, match=message):
        batch.fused_losses(batch.joint_inputs())


def test_without_a_duration_above_zero_no_path_exists():
    batch = RandomBatch(33, (0,), (2, 4, 2))
    losses = batch.fused_losses(batch.joint_inputs())
    assert losses.tolist() == [math.inf, math.inf]

"""The loss fused with the joint network against the plain reference, finite differences and given logits."""

import math
from dataclasses import replace

import pytest
import torch
from loss_helpers import (
    BLANK_ID,
    JOINT_WIDTH,
    VOCAB_SIZE,
    RandomBatch,
    gradients,
    joint_logits,
    relative_error,
)
from torch.nn import functional as F

from transformers_parakeet.losses import tdt_loss, transducer_loss
from transformers_parakeet.losses.chunked_joint import (
    ChunkedJoint,
    GradientAccumulator,
    JointSettings,
    draw_dropout_mask,
    find_active_nodes,
    locate_inputs,
    plan_chunks,
)
from transformers_parakeet.losses.lattice import NodeLogProbs, TransducerOptions, build_lattice
from transformers_parakeet.losses.path_sums import compute_losses_and_posteriors

DURATION_SETS = [None, (0, 1, 2, 3, 4), (0, 1), (0, 2, 5), (1, 2), (3, 0, 1), (1,), (0, 1, 1)]
NUM_BATCHES = 220
SETTINGS = JointSettings(VOCAB_SIZE, "relu", 0.0, 0, 2**20, torch.float)


def rnnt_lattice(batch, shape):
    """Build the RNN-T lattices of a random batch; the shape is (B, T, U+1)."""
    options = TransducerOptions(BLANK_ID, None, 0.0, 0.0)
    return build_lattice(shape, VOCAB_SIZE, batch.labels, *batch.lengths, options)


def test_random_batches_equal_float64_and_are_as_exact_as_autograd():
    errors = {"autograd": [], "fused": [], "many chunks": [], "logits": []}
    num_batches_with = {"T=1": 0, "U=0": 0, "U>T": 0, "infinite": 0}
    for seed in range(NUM_BATCHES):
        batch = RandomBatch(seed, DURATION_SETS[seed % len(DURATION_SETS)])
        double_inputs, float_inputs = batch.joint_inputs(), batch.joint_inputs(torch.float)
        expected = batch.reference_losses(double_inputs)
        expected_gradients = gradients(expected, double_inputs)
        computed = {
            "autograd": batch.reference_losses(float_inputs),
            "fused": batch.fused_losses(float_inputs),
            # chunks of a few nodes, of which none is cached
            "many chunks": batch.fused_losses(float_inputs, workspace_bytes=2000),
            "logits": batch.logits_losses(float_inputs),
        }
        for name, losses in computed.items():
            # measured: 6e-7
            torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
            errors[name].append(relative_error(gradients(losses, float_inputs), expected_gradients))
        lengths = list(zip(batch.label_lengths, batch.frame_lengths, strict=True))
        num_batches_with["T=1"] += 1 in batch.frame_lengths
        num_batches_with["U=0"] += 0 in batch.label_lengths
        num_batches_with["U>T"] += any(num_labels > num_frames for num_labels, num_frames in lengths)
        num_batches_with["infinite"] += bool(expected.isinf().any())
    assert min(num_batches_with.values()) >= 20, num_batches_with
    means = {name: sum(values) / NUM_BATCHES for name, values in errors.items()}
    for name in ("fused", "many chunks", "logits"):
        # measured: at most 1.7e-6 (autograd 7.4e-6), on average 1.5e-7 (autograd 6.7e-7)
        assert max(errors[name]) <= max(errors["autograd"]), name
        assert means[name] <= means["autograd"], means


@pytest.mark.parametrize(("num_frames", "num_labels"), [(63, 9), (9, 63), (1, 63), (130, 1)])
def test_longer_clips_in_float32_equal_float64(num_frames, num_labels):
    batch = RandomBatch(num_frames, (0, 1, 2, 4), (2, num_frames, num_labels))
    double_inputs, float_inputs = batch.joint_inputs(), batch.joint_inputs(torch.float)
    expected = batch.reference_losses(double_inputs, sigma=0.05)
    losses = batch.fused_losses(float_inputs, workspace_bytes=100_000, sigma=0.05)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)
    # measured: 3e-6
    assert relative_error(gradients(losses, float_inputs), gradients(expected, double_inputs)) < 1e-5


@pytest.mark.parametrize(
    ("durations", "activation", "workspace_bytes"),
    [((0, 1, 3), "relu", 4000), ((0, 1, 3), "tanh", 2**28), (None, "sigmoid", 1), (None, "relu", 2**28)],
    ids=str,
)
def test_gradients_in_float64_equal_finite_differences(durations, activation, workspace_bytes):
    batch = RandomBatch(5, durations, (2, 4, 2))
    options = {"activation": activation, "workspace_bytes": workspace_bytes, "sigma": 0.1}

    def losses(*joint_inputs):
        """Return (B,) losses."""
        return batch.fused_losses(joint_inputs, **options)

    # a second backward computes the logits again instead of reading the cache: equal up to the order of sums
    assert torch.autograd.gradcheck(losses, batch.joint_inputs(), nondet_tol=1e-10)


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4)], ids=str)
def test_padding_is_never_read(durations):
    batch = RandomBatch(11, durations, (3, 7, 5))
    batch.frame_lengths, batch.label_lengths = [7, 4, 1], [3, 5, 0]
    clips = list(enumerate(zip(batch.frame_lengths, batch.label_lengths, strict=True)))
    clean, poisoned = batch.joint_inputs(torch.float), batch.joint_inputs(torch.float)
    with torch.no_grad():
        for clip, (num_frames, num_labels) in clips:
            poisoned[0][clip, num_frames:] = math.nan
            poisoned[1][clip, num_labels + 1 :] = math.nan
    expected = batch.fused_losses(clean)
    expected_gradients = gradients(expected, clean)
    for clip, (_, num_labels) in clips:
        batch.labels[clip, num_labels:] = torch.tensor([-100, 10**6, BLANK_ID, -1, 7])[: 5 - num_labels]
    losses = batch.fused_losses(poisoned)
    assert torch.equal(losses, expected)
    for gradient, expected_gradient in zip(gradients(losses, poisoned), expected_gradients, strict=True):
        assert torch.equal(gradient, expected_gradient)
    for clip, (num_frames, num_labels) in clips:
        assert not expected_gradients[0][clip, num_frames:].any()
        assert not expected_gradients[1][clip, num_labels + 1 :].any()


def test_a_nan_in_a_valid_frame_reaches_the_loss_and_the_gradients():
    batch = RandomBatch(13, None, (2, 5, 2))
    inputs = batch.joint_inputs(torch.float)
    with torch.no_grad():
        inputs[0][0, 0] = math.nan
    losses = batch.fused_losses(inputs)
    losses.sum().backward()
    assert losses[0].isnan()
    assert inputs[2].grad.isnan().any()


def test_non_contiguous_inputs():
    batch = RandomBatch(14, (0, 1, 2), (2, 6, 3))
    contiguous, leaves = batch.joint_inputs(), batch.joint_inputs()
    strided = [leaf.transpose(0, -1).contiguous().transpose(0, -1) for leaf in leaves]
    assert not strided[0].is_contiguous()
    expected = batch.fused_losses(contiguous)
    losses = batch.fused_losses(strided)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    for gradient, expected_gradient in zip(gradients(losses, leaves), gradients(expected, contiguous), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_skipped_nodes_do_not_change_the_gradients():
    batch = RandomBatch(15, None, (2, 40, 20))
    batch.frame_lengths, batch.label_lengths = [40, 31], [20, 11]
    double_inputs, float_inputs = batch.joint_inputs(), batch.joint_inputs(torch.float)
    with torch.no_grad():
        for tensor in (*double_inputs, *float_inputs):
            # logits that differ much, as those of a trained model
            tensor.mul_(2.0)
    lattice = rnnt_lattice(batch, (2, 40, 21))
    log_probs = joint_logits(*float_inputs).detach().log_softmax(-1).flatten(0, 2)[lattice.nodes]
    next_labels = locate_inputs(lattice, lattice.nodes).next_labels
    label = log_probs.gather(1, next_labels[:, None])[:, 0]
    _, posteriors = compute_losses_and_posteriors(lattice, NodeLogProbs(log_probs[:, BLANK_ID], label, None))
    num_active = len(find_active_nodes(lattice, posteriors, torch.ones(2)))
    assert 60 <= num_active < 0.8 * len(lattice.nodes)
    fused_gradients = gradients(batch.fused_losses(float_inputs), float_inputs)
    autograd_gradients = gradients(batch.reference_losses(float_inputs), float_inputs)
    expected = gradients(batch.reference_losses(double_inputs), double_inputs)
    # measured: 3e-6 against autograd's 4e-6
    assert relative_error(fused_gradients, expected) <= 2 * relative_error(autograd_gradients, expected)


@pytest.mark.parametrize("workspace_bytes", [2000, 2**28])
def test_backward_runs_again_only_with_retain_graph(workspace_bytes):
    batch = RandomBatch(16, (0, 1, 2), (2, 6, 3))
    inputs = batch.joint_inputs()
    loss = batch.fused_losses(inputs, reduction="sum", workspace_bytes=workspace_bytes)
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for gradient, expected in zip(second, first, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, inputs)


def test_a_second_derivative_raises():
    batch = RandomBatch(17, None, (2, 4, 2))
    inputs = batch.joint_inputs()
    for losses in (batch.fused_losses(inputs), batch.logits_losses(inputs)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(losses.sum(), inputs[0], create_graph=True)


def test_each_input_can_be_frozen():
    batch = RandomBatch(18, (0, 1, 2), (2, 6, 3))
    inputs = batch.joint_inputs()
    expected = gradients(batch.fused_losses(inputs), inputs)
    for frozen in ([2, 3], [0, 1], [0], [1, 3]):
        inputs = batch.joint_inputs()
        for index in frozen:
            inputs[index].requires_grad_(False)
        batch.fused_losses(inputs, reduction="sum").backward()
        for index, tensor in enumerate(inputs):
            if index in frozen:
                assert tensor.grad is None
            else:
                torch.testing.assert_close(tensor.grad, expected[index], rtol=1e-10, atol=1e-12)


def test_a_frozen_output_layer_needs_no_memory_for_its_gradient():
    batch = RandomBatch(18, None, (2, 6, 3))
    lattice = rnnt_lattice(batch, (2, 6, 4))
    joint = ChunkedJoint(*batch.joint_inputs(), lattice, replace(SETTINGS, dtype=torch.double))
    zeros = torch.zeros(len(lattice.nodes), dtype=torch.double)
    _, posteriors = compute_losses_and_posteriors(lattice, NodeLogProbs(zeros, zeros, None))
    accumulator = GradientAccumulator(joint, posteriors, [True, True, False, False])
    assert accumulator.weight_grad is None
    assert accumulator.bias_grad is None


def test_chunks_stay_within_the_workspace():
    # 1025 tokens in rows of 1040 float32 values, and six rows of 640 values
    logit_bytes, node_bytes = 1040 * 4, 1040 * 4 + 6 * 640 * 4
    workspace = 256 * 2**20
    settings = replace(SETTINGS, vocab_size=1025, workspace_bytes=workspace)
    plan = plan_chunks(10**6, 640, settings, "cpu")
    assert plan.chunk_size == workspace // 8 // node_bytes
    used = plan.chunk_size * (node_bytes + plan.num_cached * logit_bytes)
    assert used <= workspace < used + plan.chunk_size * logit_bytes
    # half precision caches nothing
    assert plan_chunks(10**6, 640, replace(settings, dtype=torch.bfloat16), "cuda").num_cached == 0
    # a workspace of one byte, and a batch without nodes
    assert plan_chunks(10, 640, replace(settings, workspace_bytes=1), "cpu").chunk_size == 1
    assert plan_chunks(0, 640, settings, "cpu").chunk_size == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype, autocast):
    batch = RandomBatch(19, (0, 1, 2), (2, 6, 3))
    double_inputs = batch.joint_inputs()
    expected = batch.reference_losses(double_inputs)
    expected_gradients = gradients(expected, double_inputs)
    inputs = batch.joint_inputs(torch.float if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        fused = batch.fused_losses(inputs)
        logits = batch.logits_losses(inputs)
    assert fused.dtype == torch.float32
    fused_gradients = gradients(fused, inputs)
    assert [gradient.dtype for gradient in fused_gradients] == [tensor.dtype for tensor in inputs]
    # as far from float64 as the joint network in that precision; measured: equal within a third
    assert relative_error([fused], [expected]) <= 2 * relative_error([logits], [expected]) + 1e-3
    logits_error = relative_error(gradients(logits, inputs), expected_gradients)
    assert relative_error(fused_gradients, expected_gradients) <= 2 * logits_error


def test_dropout_masks_depend_on_the_node_and_the_seed_only():
    nodes = torch.arange(400)
    mask = draw_dropout_mask(nodes, 500, 0.3, seed=12345)
    # 200000 draws: five standard deviations are 0.005
    assert abs(mask.double().mean().item() - 0.7) < 0.005
    assert mask.double().mean(0).std().item() < 2 * math.sqrt(0.21 / 400)
    assert torch.equal(draw_dropout_mask(nodes[7:9], 500, 0.3, seed=12345), mask[7:9])
    mask_of_next_seed = draw_dropout_mask(nodes, 500, 0.3, seed=12346)
    # independent masks agree on 0.7^2 + 0.3^2 of the entries
    assert abs((mask_of_next_seed == mask).double().mean().item() - 0.58) < 0.006


@pytest.mark.parametrize("workspace_bytes", [3000, 2**28])
def test_dropout_equals_a_joint_network_with_the_same_mask(workspace_bytes):
    batch = RandomBatch(20, (0, 1, 2), (2, 6, 3))
    inputs, expected_inputs = batch.joint_inputs(), batch.joint_inputs()
    torch.manual_seed(3)
    losses = batch.fused_losses(inputs, dropout=0.4, workspace_bytes=workspace_bytes)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    mask = draw_dropout_mask(torch.arange(2 * 6 * 4), JOINT_WIDTH, 0.4, seed).view(2, 6, 4, JOINT_WIDTH)
    encoder_states, predictor_states, weight, bias = expected_inputs
    hidden = torch.relu(encoder_states[:, :, None] + predictor_states[:, None]) * mask / 0.6
    token_logits, duration_logits = F.linear(hidden, weight, bias).split([VOCAB_SIZE, 3], -1)
    arguments = batch.labels, *batch.lengths, BLANK_ID, (0, 1, 2)
    expected = tdt_loss(token_logits, duration_logits, *arguments, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    expected_gradients = gradients(expected, expected_inputs)
    for gradient, expected_gradient in zip(gradients(losses, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("durations", [None, (0, 1, 2)], ids=str)
def test_fastemit_scales_only_the_token_gradients_of_labels(durations):
    batch = RandomBatch(21, durations, (2, 6, 3))
    inputs, expected_inputs = batch.joint_inputs(), batch.joint_inputs()
    losses = batch.fused_losses(inputs, fastemit_lambda=0.25)
    torch.testing.assert_close(losses, batch.reference_losses(expected_inputs), rtol=1e-12, atol=0)
    expected = batch.reference_losses(expected_inputs, fastemit_lambda=0.25)
    expected_gradients = gradients(expected, expected_inputs)
    for gradient, expected_gradient in zip(gradients(losses, inputs), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-12)
    without_fastemit = gradients(batch.fused_losses(inputs), inputs)
    assert relative_error(without_fastemit, expected_gradients) > 0.01
    # the bias of the durations
    torch.testing.assert_close(
        expected_gradients[3][VOCAB_SIZE:], without_fastemit[3][VOCAB_SIZE:], rtol=1e-9, atol=1e-12
    )


def test_omega_draws_the_rnnt_loss_for_the_whole_batch():
    batch = RandomBatch(22, (0, 1, 2), (3, 6, 3))
    inputs = batch.joint_inputs()
    encoder_states, predictor_states, weight, bias = inputs
    tdt = batch.fused_losses(inputs, sigma=0.05)
    token_layer = weight[:VOCAB_SIZE], bias[:VOCAB_SIZE]
    arguments = batch.labels, *batch.lengths, BLANK_ID
    rnnt = transducer_loss(encoder_states, predictor_states, *token_layer, *arguments, reduction="none")
    torch.manual_seed(0)
    draws = [batch.fused_losses(inputs, sigma=0.05, omega=0.3) for _ in range(200)]
    is_rnnt = [torch.equal(draw, rnnt) for draw in draws]
    assert all(drawn or torch.equal(draw, tdt) for drawn, draw in zip(is_rnnt, draws, strict=True))
    # five standard deviations
    assert abs(sum(is_rnnt) - 60) < 33
    torch.manual_seed(0)
    repeated = [torch.equal(batch.fused_losses(inputs, sigma=0.05, omega=0.3), rnnt) for _ in range(20)]
    assert repeated == is_rnnt[:20]
    omega_gradients = gradients(batch.fused_losses(inputs, sigma=0.05, omega=1.0), inputs)
    for gradient, expected in zip(omega_gradients, gradients(rnnt, inputs), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)
    assert not omega_gradients[2][VOCAB_SIZE:].any()


def test_an_impossible_transcript_has_an_infinite_loss_or_zero_and_no_gradient():
    # durations of two frames cannot end at frame five; the clip of four frames is possible
    batch = RandomBatch(23, (0, 2), (2, 5, 2))
    batch.frame_lengths, batch.label_lengths = [5, 4], [2, 1]
    inputs = batch.joint_inputs()
    losses = batch.fused_losses(inputs)
    assert losses[0] == math.inf
    assert losses[1].isfinite()
    zeroed = batch.fused_losses(inputs, zero_infinity=True)
    assert zeroed.tolist() == [0.0, losses[1].item()]
    for loss in (losses.sum(), zeroed.sum()):
        loss_gradients = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert not loss_gradients[0][0].any()
        assert loss_gradients[0][1].any()
        assert all(gradient.isfinite().all() for gradient in loss_gradients)


def test_clips_without_frames_or_labels():
    batch = RandomBatch(24, (0, 1, 2), (2, 4, 2))
    batch.frame_lengths, batch.label_lengths = [0, 4], [1, 0]
    inputs = batch.joint_inputs()
    losses = batch.fused_losses(inputs)
    assert losses[0] == math.inf
    torch.testing.assert_close(losses[1], batch.reference_losses(inputs)[1], rtol=1e-12, atol=0)
    # no clip has a label
    batch = RandomBatch(25, None, (2, 4, 0))
    inputs = batch.joint_inputs()
    torch.testing.assert_close(batch.fused_losses(inputs), batch.reference_losses(inputs), rtol=1e-12, atol=0)

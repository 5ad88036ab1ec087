"""The kernel against a plain float64 loop: losses, gradients, odd sizes, errors.

The tests run on a GPU if there is one, otherwise by Triton's interpreter on the CPU. All memory that the kernel
allocates is filled with NaN first.
"""

import pytest
import torch

pytest.importorskip("triton")

from reference import joint_logits, reference_loss
from transducer_loss import lattice, layers, transducer_loss, transducer_loss_from_logits
from transducer_loss import loss as loss_module
from transducer_loss.joint import JointSettings, prepare_inputs, split_into_chunks, write_logits
from transducer_loss.lattice import number_nodes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# measured over the cases below, relative to the largest value: 8e-8 for losses and 5e-7 for gradients
LOSS_ERROR, GRADIENT_ERROR = 1e-6, 3e-6


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill new memory with values that a result must not depend on."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(tensor):
        return tensor.fill_(torch.nan if tensor.dtype.is_floating_point else -77)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: fill(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: fill(empty_like(*args, **kwargs)))


def inputs(batch=2, frames=4, labels=3, vocab_size=7, joint_size=6, durations=None):
    """Random encoder states, predictor states, weight and bias, and random labels; the last token is the blank."""
    generator = torch.Generator().manual_seed(0)
    outputs = vocab_size + (0 if durations is None else len(durations))
    shapes = [(batch, frames, joint_size), (batch, labels + 1, joint_size), (outputs, joint_size), (outputs,)]
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]
    label_ids = torch.randint(vocab_size - 1, (batch, labels), generator=generator).to(DEVICE)
    return tensors, label_ids


def lengths(*values):
    """A tensor of lengths on the device."""
    return torch.tensor(values, device=DEVICE)


def expected(logits, labels, frame_lengths, label_lengths, blank_id, *options):
    """The (B,) losses of the reference."""
    utterances = zip(logits, labels.tolist(), frame_lengths.tolist(), label_lengths.tolist(), strict=True)
    return torch.stack([reference_loss(*utterance, blank_id, *options) for utterance in utterances])


def assert_close(result, exact, error):
    """Compare with the exact values; the error is relative to the largest of them."""
    result, exact = result.detach().double(), exact.detach().double()
    assert (result - exact).abs().max() <= error * exact.abs().max().clamp(min=1e-3)


CASES = {
    "rnnt": ({}, None, (4, 2), (3, 3), {}),
    "rnnt, one frame and no labels": ({"frames": 1, "labels": 0}, None, (1, 1), (0, 0), {}),
    "rnnt, more labels than frames": ({"frames": 2, "labels": 6}, None, (2, 1), (6, 5), {"activation": "sigmoid"}),
    "tdt": ({"frames": 5, "labels": 2}, (0, 1, 2, 3, 4), (5, 4), (2, 1), {"sigma": 0.05}),
    "tdt, more labels than frames": ({"frames": 3, "labels": 5}, (0, 1, 2), (3, 2), (5, 3), {"activation": "tanh"}),
    "tdt, gaps": ({"frames": 9, "labels": 1}, (0, 1, 2, 4, 8), (9, 8), (1, 0), {}),
    "tdt, every label advances": ({"frames": 5, "labels": 2}, (1, 2), (5, 4), (2, 1), {"fastemit_lambda": 0.2}),
    "tdt, durations out of order": ({"labels": 2}, (2, 0, 1), (4, 3), (1, 2), {"fastemit_lambda": 0.2}),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_loss_and_all_gradients(name):
    sizes, durations, frame_lengths, label_lengths, options = CASES[name]
    tensors, labels = inputs(**sizes, durations=durations)
    frame_lengths, label_lengths = lengths(*frame_lengths), lengths(*label_lengths)
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    logits = joint_logits(*exact, options.get("activation", "relu"))
    truth = expected(
        logits, labels, frame_lengths, label_lengths, 6, durations, options.get("sigma", 0.0),
        options.get("fastemit_lambda", 0.0),
    )  # fmt: skip
    # padding must not be read
    for utterance in range(2):
        tensors[0][utterance, frame_lengths[utterance] :] = torch.nan
        tensors[1][utterance, label_lengths[utterance] + 1 :] = torch.nan
        labels[utterance, label_lengths[utterance] :] = -100
    leaves = [tensor.requires_grad_() for tensor in tensors]
    # 300 bytes hold one to three nodes
    losses = transducer_loss(
        *leaves, labels, frame_lengths, label_lengths, 6, durations, reduction="none", workspace_bytes=300, **options
    )
    assert losses.dtype == torch.float32
    assert_close(losses, truth, LOSS_ERROR)
    factors = torch.tensor([1.0, -0.5], device=DEVICE)
    losses.backward(factors)
    truth.backward(factors.double())
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        assert_close(leaf.grad, exact_leaf.grad, GRADIENT_ERROR)


@pytest.mark.parametrize(("name", "overwrite"), [("rnnt", False), ("rnnt", True), ("tdt", False), ("tdt", True)])
def test_loss_from_logits_and_its_gradient(name, overwrite):
    sizes, durations, frame_lengths, label_lengths, options = CASES[name]
    tensors, labels = inputs(**sizes, durations=durations)
    frame_lengths, label_lengths = lengths(*frame_lengths), lengths(*label_lengths)
    exact = joint_logits(*tensors).double().requires_grad_()
    truth = expected(exact, labels, frame_lengths, label_lengths, 6, durations, options.get("sigma", 0.0))
    truth.sum().backward()
    padded_logits = exact.detach().float()
    for utterance in range(2):
        padded_logits[utterance, frame_lengths[utterance] :] = torch.nan
        padded_logits[utterance, :, label_lengths[utterance] + 1 :] = torch.nan
    leaves = [padded_logits[..., :7].clone().requires_grad_()]
    if durations is not None:
        # a slice, whose rows are not contiguous
        leaves.append(padded_logits.clone()[..., 7:].requires_grad_())
    originals = [leaf.detach().clone() for leaf in leaves]
    token_and_duration_logits = leaves if durations is not None else [*leaves, None]
    losses = transducer_loss_from_logits(
        *token_and_duration_logits,
        labels,
        frame_lengths,
        label_lengths,
        6,
        durations,
        reduction="none",
        overwrite_logits=overwrite,
        **options,
    )
    losses.sum().backward(retain_graph=True)
    assert_close(losses, truth, LOSS_ERROR)
    assert_close(torch.cat([leaf.grad for leaf in leaves], -1), exact.grad, GRADIENT_ERROR)
    if overwrite:
        assert torch.equal(leaves[0].detach(), leaves[0].grad)
        with pytest.raises(RuntimeError, match="once"):
            losses.sum().backward()
    else:
        torch.testing.assert_close(leaves, originals, rtol=0, atol=0, equal_nan=True)


def test_labels_in_several_tiles(monkeypatch):
    tensors, labels = inputs(batch=1, frames=3, labels=9, durations=(0, 1, 2))
    arguments = (labels, lengths(3), lengths(9), 6, (0, 1, 2))
    truth = expected(joint_logits(*[tensor.double() for tensor in tensors]), *arguments)
    monkeypatch.setattr(lattice, "BLOCK_U", 4)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    losses = transducer_loss(*leaves, *arguments, reduction="none")
    assert_close(losses, truth, LOSS_ERROR)
    tiled = torch.autograd.grad(losses.sum(), leaves)
    monkeypatch.undo()
    untiled = torch.autograd.grad(transducer_loss(*leaves, *arguments, reduction="sum"), leaves)
    for gradient, untiled_gradient in zip(tiled, untiled, strict=True):
        assert_close(gradient, untiled_gradient, GRADIENT_ERROR)


# the rounding of the gradient in the dtype of the logits: half of 2**-10 and of 2**-7 of the largest gradient
@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2.0**-11), (torch.bfloat16, 2.0**-8)])
def test_half_precision_logits_are_not_rounded_again(dtype, error):
    tensors, labels = inputs(durations=(0, 1, 2))
    logits = joint_logits(*tensors).to(dtype)
    exact = logits.double().requires_grad_()
    arguments = (labels, lengths(4, 3), lengths(3, 2), 6, (0, 1, 2))
    truth = expected(exact, *arguments)
    truth.sum().backward()
    tokens, durations = logits[..., :7].clone().requires_grad_(), logits[..., 7:].clone().requires_grad_()
    losses = transducer_loss_from_logits(tokens, durations, *arguments, reduction="none")
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert tokens.grad.dtype == dtype
    assert_close(losses, truth, LOSS_ERROR)
    assert_close(torch.cat([tokens.grad, durations.grad], -1), exact.grad, error)


def test_autocast_sets_the_dtype_and_gradients_have_the_dtype_of_the_inputs():
    tensors, labels = inputs()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (labels, lengths(4, 4), lengths(3, 3), 6)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = transducer_loss(*leaves, *arguments, reduction="sum")
    loss.backward()
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    loss_of_rounded = transducer_loss(*rounded, *arguments, reduction="sum")
    loss_of_rounded.backward()
    assert loss.item() == loss_of_rounded.item()
    assert [leaf.grad.dtype for leaf in leaves] == [torch.float32] * 4
    assert all(torch.equal(leaf.grad.bfloat16(), half.grad) for leaf, half in zip(leaves, rounded, strict=True))


def test_reductions():
    tensors, labels = inputs()
    arguments = (*tensors, labels, lengths(4, 3), lengths(3, 0), 6)
    losses = transducer_loss(*arguments, reduction="none")
    reduced = {
        "sum": losses.sum(),
        "mean": (losses[0] / 3 + losses[1]) / 2,
        "mean_batch": losses.mean(),
        "mean_volume": losses.sum() / 3,
    }
    for reduction, value in reduced.items():
        torch.testing.assert_close(transducer_loss(*arguments, reduction=reduction), value)


def test_a_transcript_without_a_path():
    # every label advances a frame, and the last blank advances one
    tensors, labels = inputs(frames=3, labels=3, durations=(1, 2))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (*leaves, labels, lengths(3, 3), lengths(3, 1), 6, (1, 2))
    losses = transducer_loss(*arguments, reduction="none")
    assert losses[0].item() == torch.inf
    assert losses[1].isfinite()
    zeroed = transducer_loss(*arguments, reduction="none", zero_infinity=True)
    assert zeroed.tolist() == [0.0, losses[1].item()]
    zeroed.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not leaves[0].grad[0].any()
    assert leaves[0].grad[1].any()


def test_an_utterance_without_frames():
    tensors, labels = inputs()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for frame_lengths, alone in ((lengths(0, 4), 1), (lengths(4, 0), 0)):
        losses = transducer_loss(*leaves, labels, frame_lengths, lengths(3, 3), 6, reduction="none")
        assert losses[1 - alone].item() == torch.inf
        rows = [leaf[alone : alone + 1] for leaf in leaves[:2]]
        loss_per_label = transducer_loss(*rows, *leaves[2:], labels[alone : alone + 1], lengths(4), lengths(3), 6)
        assert losses[alone].item() == pytest.approx(3 * loss_per_label.item(), rel=LOSS_ERROR)
        gradient = torch.autograd.grad(losses[alone], leaves[0])[0]
        assert not gradient[1 - alone].any()
        assert gradient.isfinite().all()


def test_nan_reaches_the_loss_and_the_gradients():
    tensors, labels = inputs(durations=(0, 1))
    tensors[0][0, 1, 2] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in tensors]
    losses = transducer_loss(*leaves, labels, lengths(4, 4), lengths(3, 3), 6, (0, 1), reduction="none")
    assert losses[0].isnan()
    assert losses[1].isfinite()
    losses.sum().backward()
    assert leaves[2].grad.isnan().any()


def test_only_tensors_that_require_a_gradient_get_one():
    tensors, labels = inputs()
    tensors[0].requires_grad_()
    arguments = (labels, lengths(4, 4), lengths(3, 3), 6)
    loss = transducer_loss(*tensors, *arguments)
    loss.backward(retain_graph=True)
    first_gradient = tensors[0].grad.clone()
    loss.backward()
    assert torch.equal(tensors[0].grad, 2 * first_gradient)
    assert [tensor.grad for tensor in tensors[1:]] == [None] * 3
    weight = tensors[2].requires_grad_()
    squared = transducer_loss(*tensors, *arguments) ** 2
    (gradient,) = torch.autograd.grad(squared, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_skipped_nodes_do_not_change_the_gradients(monkeypatch):
    tensors, labels = inputs(frames=6, labels=3)
    # large logits: most nodes have a negligible posterior
    leaves = [tensor.mul_(3).requires_grad_() for tensor in tensors]
    arguments = (labels, lengths(6, 6), lengths(3, 3), 6)
    relevant_counts = []

    def count_relevant(*args):
        posteriors = lattice.run_posteriors(*args)
        relevant_counts.append(int(posteriors.is_relevant.sum()))
        return posteriors

    monkeypatch.setattr(loss_module, "run_posteriors", count_relevant)
    skipping = torch.autograd.grad(transducer_loss(*leaves, *arguments, reduction="sum"), leaves)
    monkeypatch.setattr(loss_module, "NEGLIGIBLE", -1.0)
    complete = torch.autograd.grad(transducer_loss(*leaves, *arguments, reduction="sum"), leaves)
    assert relevant_counts[0] < relevant_counts[1] == 48
    for gradient, complete_gradient in zip(skipping, complete, strict=True):
        # the order of the sums differs: measured 5e-8
        assert_close(gradient, complete_gradient, 2.0**-22)


def test_omega_draws_the_rnnt_loss():
    tensors, labels = inputs(frames=3, labels=2, durations=(0, 1, 2))
    arguments = (labels, lengths(3, 2), lengths(2, 2), 6)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    drawn = transducer_loss(*leaves, *arguments, (0, 1, 2), sigma=0.1, omega=1.0)
    rnnt = transducer_loss(*leaves[:2], leaves[2][:7], leaves[3][:7], *arguments)
    assert drawn.item() == rnnt.item()
    drawn.backward()
    assert leaves[2].grad[:7].any()
    assert not leaves[2].grad[7:].any()
    tdt = transducer_loss(*leaves, *arguments, (0, 1, 2))
    for seed in range(2):
        torch.manual_seed(seed)
        drawn = rnnt if torch.rand(()) < 0.5 else tdt
        torch.manual_seed(seed)
        assert transducer_loss(*leaves, *arguments, (0, 1, 2), omega=0.5).item() == drawn.item()


def test_dropout_is_the_same_in_both_directions():
    tensors, labels = inputs(joint_size=40)
    arguments = (labels, lengths(4, 3), lengths(3, 2), 6)
    torch.manual_seed(3)
    seed = int(torch.randint(2**31 - 1, ()).item())
    # hidden units of all nodes; no sigmoid is zero without dropout
    nodes = number_nodes(*arguments[:3], ([4, 3], [3, 2]), 4, has_rows=False)
    joint_inputs = prepare_inputs(*tensors)
    joint = JointSettings("sigmoid", 0.25, seed, 2**20)
    all_nodes = torch.arange(nodes.num_nodes, dtype=torch.int32, device=DEVICE)
    (chunk,) = split_into_chunks(all_nodes, joint_inputs, joint, needs_hidden_gradient=False)
    write_logits(chunk, joint_inputs, nodes, joint)
    is_kept = chunk.hidden != 0
    # 25 nodes of 40 units: three standard deviations are 0.04
    assert abs(is_kept.float().mean().item() - 0.75) < 0.05
    mask = torch.zeros(2, 4, 4, 40, dtype=torch.float64, device=DEVICE)
    mask[0] = is_kept[:16].view(4, 4, 40)
    mask[1, :3, :3] = is_kept[16:].view(3, 3, 40)
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    hidden = torch.sigmoid(exact[0][:, :, None] + exact[1][:, None]) * mask / 0.75
    truth = expected(hidden @ exact[2].t() + exact[3], *arguments).sum()
    truth.backward()
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.manual_seed(3)
    loss = transducer_loss(*leaves, *arguments, activation="sigmoid", reduction="sum", dropout=0.25)
    loss.backward()
    assert_close(loss, truth, LOSS_ERROR)
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        assert_close(leaf.grad, exact_leaf.grad, GRADIENT_ERROR)


def test_the_layer_has_no_state():
    layer = layers.TransducerLoss()
    assert type(layer).__init__ is torch.nn.Module.__init__
    assert not list(layer.state_dict())
    tensors, labels = inputs()
    arguments = (*tensors, labels, lengths(4, 4), lengths(3, 3), 6)
    assert layer(*arguments).item() == transducer_loss(*arguments).item()


def changed(**changes):
    """The arguments of a valid call, with some of them changed."""
    (encoder, predictor, weight, bias), labels = inputs()
    arguments = {
        "encoder_states": encoder, "predictor_states": predictor, "head_weight": weight, "head_bias": bias,
        "labels": labels, "frame_lengths": lengths(4, 4), "label_lengths": lengths(3, 3), "blank_id": 6,
    }  # fmt: skip
    return {**arguments, **changes}


REFUSED = {
    "float64": ({"head_weight": torch.zeros(7, 6, dtype=torch.float64)}, TypeError, "head_weight.*float64"),
    "label dtype": ({"labels": torch.zeros(2, 3)}, TypeError, "labels.*int32 or int64"),
    "predictor shape": ({"predictor_states": torch.zeros(2, 4, 5)}, ValueError, r"predictor_states.*\(2, 4, 5\)"),
    "weight columns": ({"head_weight": torch.zeros(7, 5)}, ValueError, "head_weight.*6 columns"),
    "bias shape": ({"head_bias": torch.zeros(6)}, ValueError, r"head_bias.*\(7,\)"),
    "dimensions": ({"encoder_states": torch.zeros(4, 6)}, ValueError, "must be \\(B, T, J\\)"),
    "label shape": ({"labels": torch.zeros(2, 4, dtype=torch.long)}, ValueError, r"labels.*\(2, 3\)"),
    "frames too long": ({"frame_lengths": torch.tensor([4, 5])}, ValueError, "frame_lengths.*between 0 and 4"),
    "negative frames": ({"frame_lengths": torch.tensor([4, -1])}, ValueError, "frame_lengths.*between 0 and 4"),
    "labels too long": ({"label_lengths": torch.tensor([4, 0])}, ValueError, "label_lengths.*between 0 and 3"),
    "blank as label": ({"labels": torch.tensor([[0, 1, 2], [3, 6, 0]])}, ValueError, "row 1.*6"),
    "unknown label": ({"labels": torch.tensor([[0, 1, 2], [3, 7, 0]])}, ValueError, "other than the blank"),
    "blank": ({"blank_id": 7}, ValueError, "blank_id.*0 to 6, got 7"),
    "no duration advances": ({"durations": (0,), "blank_id": 5}, ValueError, "durations.*above 0"),
    "equal durations": ({"durations": (1, 1), "blank_id": 4}, ValueError, "different"),
    "activation": ({"activation": "gelu"}, ValueError, "activation.*gelu"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction.*max"),
    "dropout": ({"dropout": 1.0}, ValueError, "dropout"),
    "no frames at all": ({"frame_lengths": torch.tensor([0, 0])}, ValueError, "must have a frame"),
    "omega": ({"omega": 1.5}, ValueError, "omega"),
    "fastemit": ({"fastemit_lambda": -0.1}, ValueError, "fastemit_lambda"),
    "device": ({"head_bias": torch.zeros(7, device="meta")}, ValueError, "`head_bias` on meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused(name):
    changes, error, message = REFUSED[name]
    on_device = {
        key: value.to(DEVICE) if isinstance(value, torch.Tensor) and value.device.type != "meta" else value
        for key, value in changes.items()
    }
    with pytest.raises(error, match=message):
        transducer_loss(**changed(**on_device))


def test_a_device_without_triton_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in changed().items()}
    with pytest.raises(ValueError, match="CUDA"):
        transducer_loss(**arguments)


@pytest.mark.skipif(DEVICE == "cpu", reason="one tile is 1024 labels: too slow without a GPU")
def test_more_labels_than_a_tile_on_a_gpu():
    durations = (0, 1, 2, 3, 4)
    tensors, labels = inputs(batch=2, frames=3, labels=1500, joint_size=64, durations=durations)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    arguments = (labels, lengths(3, 2), lengths(1500, 1100), 6, durations)
    truth = expected(joint_logits(*exact), *arguments)
    losses = transducer_loss(*leaves, *arguments, reduction="none")
    assert_close(losses, truth, LOSS_ERROR)
    losses.sum().backward()
    truth.sum().backward()
    for leaf, exact_leaf in zip(leaves, exact, strict=True):
        # not measured: no GPU was at hand
        assert_close(leaf.grad, exact_leaf.grad, 1e-4)

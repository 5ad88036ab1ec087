"""Checks the fused transducer loss and its parts against float64 recursions, gradcheck and the joint network."""

import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from transformers_parakeet.losses.fused import Joint, _Collector, _keep, _Scorer
from transformers_parakeet.losses.lattice import make_task, solve
from transformers_parakeet.losses.transducer import TransducerLoss, rnnt_loss, tdt_loss, transducer_loss

VOCAB, BLANK, WIDTH = 7, 5, 12
DURATION_SETS = [None, (0, 1, 2, 3, 4), (0, 1), (0, 2, 5), (1, 2), (3, 0, 1), (1,), (0, 1, 1)]
SHAPES = 220


def lattice_loss(
    logits: Tensor,
    targets: list[int],
    frames: int,
    durations: tuple[int, ...] | None,
    sigma: float = 0.0,
    fastemit: float = 0.0,
) -> Tensor:
    """Loss of one clip as a recursion from the end over scalars, in the precision of the logits.

    Args:
        logits: (T, U+1, V [+ D]) raw scores.
        targets: the labels.
        frames: valid frames.
        durations: of TDT; `None` for RNN-T.
        sigma: subtracted from every token score of TDT.
        fastemit: adds this share of the gradient of every label's token score, without changing the value.
    """
    vocab = logits.shape[-1] - len(durations or ())
    tokens = logits[..., :vocab].log_softmax(-1) - (sigma if durations else 0.0)
    spans = logits[..., vocab:].log_softmax(-1) if durations else tokens.new_zeros(*tokens.shape[:2], 2)
    if durations is None:
        arcs = [(1, 1, True), (0, 0, False)]
    else:
        arcs = [(i, d, is_blank) for i, d in enumerate(durations) for is_blank in (True, False) if d or not is_blank]

    @cache
    def rest(frame: int, label: int) -> Tensor | None:
        ways = []
        for index, duration, is_blank in arcs:
            there, then = frame + duration, label + (not is_blank)
            if then > len(targets) or there > frames or (there == frames and not is_blank):
                continue
            score = tokens[frame, label, BLANK if is_blank else targets[label]]
            if not is_blank:
                score = score + fastemit * (score - score.detach())
            score = score + spans[frame, label, index]
            if there == frames:
                ways += [score] if then == len(targets) else []
                continue
            follows = rest(there, then)
            ways += [] if follows is None else [score + follows]
        return torch.stack(ways).logsumexp(0) if ways else None

    total = rest(0, 0) if frames else None
    return logits.new_tensor(math.inf) if total is None else -total


class Case:
    """A random batch; float64 masters that every precision rounds from."""

    def __init__(
        self, seed: int, durations: tuple[int, ...] | None = None, shape: tuple[int, ...] | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def number(limit: int) -> int:
            return int(torch.randint(limit, (), generator=generator))

        batch, frames, labels = shape or (1 + number(3), 1 + number(7), number(6))
        self.durations = durations
        self.frames = [frames] + [1 + number(frames) for _ in range(batch - 1)]
        self.counts = [number(labels + 1) for _ in range(batch - 1)] + [labels]
        self.labels = torch.randint(BLANK, (batch, labels), generator=generator)
        outputs = VOCAB + len(durations or ())
        scale = 0.3 + 2 * float(torch.rand((), generator=generator))
        shapes = (batch, frames, WIDTH), (batch, labels + 1, WIDTH), (outputs, WIDTH), (outputs,)
        self.master = [scale * torch.randn(shape, generator=generator, dtype=torch.double) for shape in shapes]

    def leaves(self, dtype: torch.dtype = torch.double) -> list[Tensor]:
        """Encoder, predictor, weight and bias."""
        # every precision gets the same numbers
        return [tensor.float().to(dtype).requires_grad_() for tensor in self.master]

    @property
    def lengths(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.frames), torch.tensor(self.counts)

    def reference(self, leaves: list[Tensor], fastemit: float = 0.0, sigma: float = 0.0) -> Tensor:
        """(B,) losses by recursion over the scores of the whole grid."""
        logits = joint(*leaves)
        return torch.stack([
            lattice_loss(logits[row], self.labels[row, :count].tolist(), frames, self.durations, sigma, fastemit)
            for row, (frames, count) in enumerate(zip(self.frames, self.counts, strict=True))
        ])  # fmt: skip

    def fused(self, leaves: list[Tensor], **options) -> Tensor:
        options = {"reduction": "none", "durations": self.durations, **options}
        return transducer_loss(*leaves, self.labels, *self.lengths, BLANK, **options)

    def given_logits(self, leaves: list[Tensor]) -> Tensor:
        logits = joint(*leaves)
        if self.durations is None:
            return rnnt_loss(logits, self.labels, *self.lengths, BLANK, "none")
        parts = logits[..., :VOCAB], logits[..., VOCAB:]
        return tdt_loss(*parts, self.labels, *self.lengths, BLANK, self.durations, reduction="none")


def joint(encoder: Tensor, predictor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(torch.relu(encoder[:, :, None] + predictor[:, None]), weight, bias)


def gradients(losses: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Gradients of the sum of the losses that are finite."""
    finite = losses.isfinite()
    if not finite.any():
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(losses[finite].sum(), leaves))


def distance(ours: list[Tensor], truth: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry of each tensor."""
    return max(
        float((a.detach().double() - b.detach().double()).abs().max() / b.detach().abs().max().clamp(min=1e-3))
        for a, b in zip(ours, truth, strict=True)
    )


def test_random_shapes_equal_float64_and_are_as_exact_as_autograd():
    errors: dict[str, list[float]] = {"autograd": [], "fused": [], "small": [], "logits": []}
    seen = {"T=1": 0, "U=0": 0, "U>T": 0, "infinite": 0}
    for seed in range(SHAPES):
        case = Case(seed, DURATION_SETS[seed % len(DURATION_SETS)])
        double, single = case.leaves(), case.leaves(torch.float)
        truth = case.reference(double)
        wanted = gradients(truth, double)
        ways = {
            "autograd": case.reference(single),
            "fused": case.fused(single),
            # chunks of a few cells, nothing kept
            "small": case.fused(single, workspace_bytes=2000),
            "logits": case.given_logits(single),
        }
        for name, losses in ways.items():
            # measured: 6e-7
            torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=1e-6)
            errors[name].append(distance(gradients(losses, single), wanted))
        seen["T=1"] += 1 in case.frames
        seen["U=0"] += 0 in case.counts
        seen["U>T"] += any(u > t for u, t in zip(case.counts, case.frames, strict=True))
        seen["infinite"] += bool(truth.isinf().any())
    assert min(seen.values()) >= 20, seen
    means = {name: sum(values) / SHAPES for name, values in errors.items()}
    for name in ("fused", "small", "logits"):
        # measured: at most 1.7e-6 against autograd's 7.4e-6, on average 1.5e-7 against 6.7e-7
        assert max(errors[name]) <= max(errors["autograd"]), name
        assert means[name] <= means["autograd"], means


@pytest.mark.parametrize(("frames", "labels"), [(63, 9), (9, 63), (1, 63), (130, 1)])
def test_longer_clips_equal_float64(frames: int, labels: int):
    case = Case(frames, (0, 1, 2, 4), (2, frames, labels))
    double, single = case.leaves(), case.leaves(torch.float)
    truth = case.reference(double, sigma=0.05)
    losses = case.fused(single, workspace_bytes=100_000, sigma=0.05)
    torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=0)
    # measured: 3e-6
    assert distance(gradients(losses, single), gradients(truth, double)) < 1e-5


@pytest.mark.parametrize(
    ("durations", "activation", "workspace_bytes"),
    [((0, 1, 3), "relu", 4000), ((0, 1, 3), "tanh", 2**28), (None, "sigmoid", 1), (None, "relu", 2**28)],
    ids=str,
)
def test_gradients_in_float64_equal_finite_differences(durations, activation: str, workspace_bytes: int):
    case = Case(5, durations, (2, 4, 2))
    options = {"activation": activation, "workspace_bytes": workspace_bytes, "sigma": 0.1}
    # a second backward computes scores that the first one found: equal up to the order of sums
    bounds = {"nondet_tol": 1e-10}
    assert torch.autograd.gradcheck(lambda *leaves: case.fused(leaves, **options), case.leaves(), **bounds)


@pytest.mark.parametrize("durations", [None, (0, 1, 3)], ids=str)
def test_gradients_of_given_logits_equal_finite_differences(durations):
    case = Case(6, durations, (2, 4, 2))
    parts = [part.detach().requires_grad_() for part in joint(*case.leaves()).split([VOCAB, len(durations or ())], -1)]

    def loss(tokens: Tensor, spans: Tensor | None = None) -> Tensor:
        if spans is None:
            return rnnt_loss(tokens, case.labels, *case.lengths, BLANK, "none")
        return tdt_loss(tokens, spans, case.labels, *case.lengths, BLANK, durations, 0.1, "none")

    assert torch.autograd.gradcheck(loss, parts if durations else parts[:1])


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 4)], ids=str)
def test_padding_is_never_read(durations):
    case = Case(11, durations, (3, 7, 5))
    case.frames, case.counts = [7, 4, 1], [3, 5, 0]
    clean, poisoned = case.leaves(torch.float), case.leaves(torch.float)
    with torch.no_grad():
        for row, (frames, count) in enumerate(zip(case.frames, case.counts, strict=True)):
            poisoned[0][row, frames:] = math.nan
            poisoned[1][row, count + 1 :] = math.nan
    losses = case.fused(clean)
    wanted = gradients(losses, clean)
    for row, count in enumerate(case.counts):
        case.labels[row, count:] = torch.tensor([-100, 10**6, BLANK, -1, 7])[: 5 - count]
    again = case.fused(poisoned)
    assert torch.equal(again, losses)
    for ours, truth in zip(gradients(again, poisoned), wanted, strict=True):
        assert torch.equal(ours, truth)
    for row, (frames, count) in enumerate(zip(case.frames, case.counts, strict=True)):
        assert not wanted[0][row, frames:].any()
        assert not wanted[1][row, count + 1 :].any()


def test_padding_of_given_logits_is_never_read():
    case = Case(12, None, (2, 6, 4))
    case.frames, case.counts = [6, 3], [2, 4]
    clean = joint(*case.leaves(torch.float)).detach()
    poisoned = clean.clone()
    poisoned[0, :, 3:], poisoned[1, 3:] = math.nan, math.nan
    rows = []
    for logits in (clean.requires_grad_(), poisoned.requires_grad_()):
        losses = rnnt_loss(logits, case.labels, *case.lengths, BLANK, "none")
        losses.sum().backward()
        rows.append((losses, logits.grad))
    assert torch.equal(rows[0][0], rows[1][0])
    assert torch.equal(rows[0][1], rows[1][1])
    assert not rows[1][1][1, 3:].any()


def test_a_nan_in_a_valid_frame_is_not_hidden():
    case = Case(13, None, (2, 5, 2))
    leaves = case.leaves(torch.float)
    with torch.no_grad():
        leaves[0][0, 0] = math.nan
    losses = case.fused(leaves)
    losses.sum().backward()
    assert losses[0].isnan()
    assert leaves[2].grad.isnan().any()


def test_non_contiguous_inputs():
    case = Case(14, (0, 1, 2), (2, 6, 3))
    plain, strided = case.leaves(), case.leaves()
    views = [leaf.transpose(0, -1).contiguous().transpose(0, -1) for leaf in strided]
    assert not views[0].is_contiguous()
    torch.testing.assert_close(case.fused(views), case.fused(plain), rtol=1e-12, atol=0)
    for ours, truth in zip(gradients(case.fused(views), strided), gradients(case.fused(plain), plain), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_cells_without_flow_are_skipped_and_nothing_changes():
    case = Case(15, None, (2, 40, 20))
    case.frames, case.counts = [40, 31], [20, 11]
    double, single = case.leaves(), case.leaves(torch.float)
    with torch.no_grad():
        for leaf in (*double, *single):
            # far apart scores, as a trained model has
            leaf.mul_(2.0)
    task = make_task((2, 40, 21), torch.device("cpu"), VOCAB, case.labels, *case.lengths, BLANK, None, 0.0, 0.0)
    scores = joint(*single).detach().log_softmax(-1).flatten(0, 2)[task.cells]
    label = scores.gather(1, task.targets[:, None].expand(-1, 40, -1).flatten()[task.cells][:, None])[:, 0]
    _, flow = solve(task, scores[:, BLANK].contiguous(), label, None)
    scorer = _Scorer(*single, task, Joint(VOCAB, "relu", 0.0, 0, 2**20), torch.float)
    active = _Collector(scorer, flow, torch.ones(2), [True] * 4).active
    assert 60 <= len(active) < 0.8 * len(task.cells)
    truth = case.reference(double)
    ours = gradients(case.fused(single), single)
    auto = gradients(case.reference(single), single)
    wanted = gradients(truth, double)
    # measured: 3e-6 against autograd's 4e-6
    assert distance(ours, wanted) <= 2 * distance(auto, wanted)


@pytest.mark.parametrize("workspace_bytes", [2000, 2**28])
def test_the_graph_serves_once_unless_it_is_kept(workspace_bytes: int):
    case = Case(16, (0, 1, 2), (2, 6, 3))
    leaves = case.leaves()
    loss = case.fused(leaves, reduction="sum", workspace_bytes=workspace_bytes)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for ours, truth in zip(second, first, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


def test_a_second_derivative_raises():
    case = Case(17, None, (2, 4, 2))
    for losses in (case.fused(leaves := case.leaves()), case.given_logits(leaves)):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(losses.sum(), leaves[0], create_graph=True)


def test_each_input_can_be_frozen():
    case = Case(18, (0, 1, 2), (2, 6, 3))
    leaves = case.leaves()
    truth = gradients(case.fused(leaves), leaves)
    for frozen in ([2, 3], [0, 1], [0], [1, 3]):
        leaves = case.leaves()
        for index in frozen:
            leaves[index].requires_grad_(False)
        case.fused(leaves, reduction="sum").backward()
        for index, leaf in enumerate(leaves):
            if index in frozen:
                assert leaf.grad is None
            else:
                torch.testing.assert_close(leaf.grad, truth[index], rtol=1e-10, atol=1e-12)


def test_a_frozen_head_costs_no_memory_for_its_gradient():
    case = Case(18, None, (2, 6, 3))
    task = make_task((2, 6, 4), torch.device("cpu"), VOCAB, case.labels, *case.lengths, BLANK, None, 0.0, 0.0)
    scorer = _Scorer(*case.leaves(), task, Joint(VOCAB, "relu", 0.0, 0, 2**20), torch.double)
    _, flow = solve(task, *(torch.zeros(len(task.cells), dtype=torch.double) for _ in range(2)), None)
    collector = _Collector(scorer, flow, torch.ones(2, dtype=torch.double), [True, True, False, False])
    assert collector.sums[2:] == [None, None]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, autocast: bool):
    case = Case(19, (0, 1, 2), (2, 6, 3))
    double = case.leaves()
    truth = case.reference(double)
    wanted = gradients(truth, double)
    leaves = case.leaves(torch.float if autocast else dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        losses = case.fused(leaves)
        plain = case.given_logits(leaves)
    assert losses.dtype == torch.float32
    ours = gradients(losses, leaves)
    assert [gradient.dtype for gradient in ours] == [leaf.dtype for leaf in leaves]
    # as far from float64 as the joint network in that precision; measured: equal within a third
    assert distance([losses], [truth]) <= 2 * distance([plain], [truth]) + 1e-3
    assert distance(ours, wanted) <= 2 * distance(gradients(plain, leaves), wanted)


def test_dropout_is_a_hash_of_the_cell():
    joint_settings = Joint(VOCAB, "relu", 0.3, 12345, 2**20)
    cells = torch.arange(400)
    keep = _keep(cells, 500, joint_settings)
    # 200000 draws: five standard deviations are 0.005
    assert abs(keep.double().mean().item() - 0.7) < 0.005
    assert keep.double().mean(0).std().item() < 2 * math.sqrt(0.21 / 400)
    assert torch.equal(_keep(cells[7:9], 500, joint_settings), keep[7:9])
    other = _keep(cells, 500, Joint(VOCAB, "relu", 0.3, 12346, 2**20))
    # independent masks agree on 0.7^2 + 0.3^2 of the entries
    assert abs((other == keep).double().mean().item() - 0.58) < 0.006


@pytest.mark.parametrize("workspace_bytes", [3000, 2**28])
def test_dropout_equals_the_joint_network_with_that_mask(workspace_bytes: int):
    case = Case(20, (0, 1, 2), (2, 6, 3))
    leaves, twins = case.leaves(), case.leaves()
    torch.manual_seed(3)
    losses = case.fused(leaves, dropout=0.4, workspace_bytes=workspace_bytes)
    torch.manual_seed(3)
    seed = int(torch.randint(2**62, ()))
    keep = _keep(torch.arange(2 * 6 * 4), WIDTH, Joint(VOCAB, "relu", 0.4, seed, 0)).view(2, 6, 4, WIDTH)
    hidden = torch.relu(twins[0][:, :, None] + twins[1][:, None]) * keep / 0.6
    logits = F.linear(hidden, *twins[2:])
    truth = tdt_loss(
        logits[..., :VOCAB], logits[..., VOCAB:], case.labels, *case.lengths, BLANK, (0, 1, 2), reduction="none"
    )
    torch.testing.assert_close(losses, truth, rtol=1e-12, atol=0)
    for ours, wanted in zip(gradients(losses, leaves), gradients(truth, twins), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("durations", [None, (0, 1, 2)], ids=str)
def test_fastemit_scales_the_token_gradients_of_labels_only(durations):
    case = Case(21, durations, (2, 6, 3))
    leaves, twins = case.leaves(), case.leaves()
    losses, truth = case.fused(leaves, fastemit_lambda=0.25), case.reference(twins, fastemit=0.25)
    torch.testing.assert_close(losses, case.reference(twins), rtol=1e-12, atol=0)
    wanted = gradients(truth, twins)
    for ours, of_token in zip(gradients(losses, leaves), wanted, strict=True):
        torch.testing.assert_close(ours, of_token, rtol=1e-9, atol=1e-12)
    plain = gradients(case.fused(leaves), leaves)
    assert distance(plain, wanted) > 0.01
    # durations feel nothing of it
    torch.testing.assert_close(wanted[3][VOCAB:], plain[3][VOCAB:], rtol=1e-9, atol=1e-12)


def test_omega_draws_the_rnnt_loss_for_the_whole_minibatch():
    case = Case(22, (0, 1, 2), (3, 6, 3))
    leaves = case.leaves()
    tdt = case.fused(leaves, sigma=0.05)
    head = leaves[2][:VOCAB], leaves[3][:VOCAB]
    rnnt = transducer_loss(*leaves[:2], *head, case.labels, *case.lengths, BLANK, reduction="none")
    torch.manual_seed(0)
    draws = [case.fused(leaves, sigma=0.05, omega=0.3) for _ in range(200)]
    kinds = [torch.equal(draw, rnnt) for draw in draws]
    assert all(kind or torch.equal(draw, tdt) for kind, draw in zip(kinds, draws, strict=True))
    # five standard deviations
    assert abs(sum(kinds) - 60) < 33
    torch.manual_seed(0)
    assert [torch.equal(case.fused(leaves, sigma=0.05, omega=0.3), rnnt) for _ in range(20)] == kinds[:20]
    ours = gradients(case.fused(leaves, sigma=0.05, omega=1.0), leaves)
    wanted = gradients(rnnt, leaves)
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    assert not ours[2][VOCAB:].any()


def test_an_impossible_transcript_is_infinite_or_zero_with_zero_gradient():
    # steps of two frames never land on the end of five; the clip of four frames is possible
    case = Case(23, (0, 2), (2, 5, 2))
    case.frames, case.counts = [5, 4], [2, 1]
    leaves = case.leaves()
    losses = case.fused(leaves)
    assert losses[0] == math.inf
    assert losses[1].isfinite()
    zeroed = case.fused(leaves, zero_infinity=True)
    assert zeroed.tolist() == [0.0, losses[1].item()]
    for total in (losses.sum(), zeroed.sum()):
        slopes = torch.autograd.grad(total, leaves, retain_graph=True)
        assert not slopes[0][0].any()
        assert slopes[0][1].any()
        assert all(slope.isfinite().all() for slope in slopes)


def test_clips_without_frames_or_labels():
    case = Case(24, (0, 1, 2), (2, 4, 2))
    case.frames, case.counts = [0, 4], [1, 0]
    leaves = case.leaves()
    losses = case.fused(leaves)
    assert losses[0] == math.inf
    torch.testing.assert_close(losses[1], case.reference(leaves)[1], rtol=1e-12, atol=0)
    # no clip has a label
    case = Case(25, None, (2, 4, 0))
    torch.testing.assert_close(case.fused(case.leaves()), case.reference(case.leaves()), rtol=1e-12, atol=0)


def test_masked_scores():
    case = Case(26, (0, 1, 2), (1, 5, 2))
    logits = joint(*case.leaves()).detach()
    parts = logits[..., :VOCAB].clone(), logits[..., VOCAB:].clone()
    other = next(token for token in range(BLANK) if token not in case.labels[0].tolist())
    # a token that is not asked for, and a duration
    parts[0][..., other], parts[1][..., 1] = -math.inf, -math.inf
    lengths = case.labels, *case.lengths, BLANK, (0, 1, 2)
    truth = lattice_loss(torch.cat(parts, -1)[0], case.labels[0].tolist(), 5, (0, 1, 2))
    tokens = parts[0].requires_grad_()
    loss = tdt_loss(tokens, parts[1], *lengths, reduction="sum")
    torch.testing.assert_close(loss, truth, rtol=1e-9, atol=0)
    loss.backward()
    assert tokens.grad.isfinite().all()
    parts[0].detach()[..., case.labels[0, 0]] = -math.inf
    assert tdt_loss(parts[0].detach(), parts[1], *lengths, reduction="sum") == math.inf


def test_the_layer_is_the_function_and_keeps_nothing():
    case = Case(27, (0, 1, 2), (2, 5, 3))
    layer = TransducerLoss()
    before = dict(vars(layer))
    leaves = case.leaves()
    loss = layer(*leaves, case.labels, *case.lengths, BLANK, durations=case.durations, sigma=0.05, reduction="mean")
    assert torch.equal(loss, case.fused(leaves, sigma=0.05, reduction="mean"))
    assert vars(layer) == before
    assert not list(layer.parameters())
    assert not layer.state_dict()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"labels": torch.zeros(2, 4, dtype=torch.long)},
            r"one column less than the 4 predictor states .* got \(2, 4\)",
        ),
        ({"labels": torch.full((2, 3), BLANK)}, r"other than the blank \(5\), got \[5\]"),
        ({"labels": torch.full((2, 3), VOCAB)}, r"ids below 7 .* got \[7\]"),
        ({"frames": [6, 3]}, r"frame lengths must be 2 numbers from 0 to 5, got \[6, 3\]"),
        ({"counts": [1, 4]}, r"label lengths must be 2 numbers from 0 to 3, got \[1, 4\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict, message: str):
    case = Case(28, (0, 1, 2), (2, 5, 3))
    case.frames, case.counts = [5, 3], [3, 2]
    vars(case).update(change)
    with pytest.raises(ValueError, match=message):
        case.fused(case.leaves())

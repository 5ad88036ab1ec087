"""Checks attention contexts against a mask for each pair of frames; test_family.py compares with NeMo."""

import math

import pytest
import torch
from conftest import encoder_fields
from torch.utils._python_dispatch import TorchDispatchMode

import transformers_parakeet as tp
from transformers_parakeet.networks import attention as attention_file
from transformers_parakeet.networks.attention import ParakeetEncoderAttention
from transformers_parakeet.networks.attention_layout import (
    BlockLayout,
    build_context_mask,
    choose_block_layout,
    map_to_nemo_local_positions,
    split_range,
)
from transformers_parakeet.networks.conformer import ParakeetEncoderRelPositionalEncoding

# float32 sums in another order; measured: up to 6e-7
TOLERANCE = 1e-5

# style, context
CONTEXTS = [
    ("regular", [5, 5]),
    ("regular", [40, 3]),
    ("regular", [0, 12]),
    ("regular", [9, -1]),
    ("regular", [-1, 4]),
    ("chunked_limited", [8, 3]),
    ("chunked_limited", [70, 0]),
    ("chunked_limited", [-1, 6]),
    ("chunked_limited", [0, 9]),
    ("chunked_limited_with_rc", [10, 4, 3]),
    ("chunked_limited_with_rc", [64, 1, 0]),
    ("chunked_limited_with_rc", [3, 5, 20]),
    ("chunked_limited_with_rc", [-1, 4, 2]),
]


def config_of(style, context, **fields):
    """Return the configuration of a small encoder with an attention context."""
    return tp.ParakeetEncoderConfig(
        **encoder_fields(attention_context_style=style, attention_context_size=context, **fields)
    )


def may_attend(style, context, query, key):
    """Tell whether a query frame may attend to a key frame, by NeMo's documentation of the style."""
    left, right = context[0], context[-1]
    if style == "regular":
        return (left < 0 or key >= query - left) and (right < 0 or key <= query + right)
    if style == "chunked_limited":
        chunks = query // (right + 1) - key // (right + 1)
        return chunks >= 0 and (left < 0 or chunks <= left // (right + 1))
    start = query // context[1] * context[1]
    return (left < 0 or key >= start - left) and key < start + context[1] + right


def attention(config, dtype=torch.float64):
    """Return an attention module with random weights."""
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    module = ParakeetEncoderAttention(config, 0).to(dtype).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def plain_attention(module, hidden, mask):
    """Compute relative attention of one clip with an (N, N) mask, one pair of frames at a time."""
    config, frames = module.config, hidden.shape[0]
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query, key, value = (p(hidden).view(frames, heads, width) for p in (module.q_proj, module.k_proj, module.v_proj))
    frequencies = 10000.0 ** (-torch.arange(0, config.hidden_size, 2, dtype=hidden.dtype) / config.hidden_size)
    scores = torch.full((heads, frames, frames), -math.inf, dtype=hidden.dtype)
    for i in range(frames):
        for j in range(frames):
            if mask[i, j]:
                angle = (i - j) * frequencies
                sinusoid = torch.stack([angle.sin(), angle.cos()], -1).flatten()
                position = module.relative_k_proj(sinusoid).view(heads, width)
                content = ((query[i] + module.bias_u) * key[j]).sum(-1)
                scores[:, i, j] = (content + ((query[i] + module.bias_v) * position).sum(-1)) / width**0.5
    weights = scores.softmax(-1)
    return module.o_proj(torch.einsum("hij,jhd->ihd", weights, value).flatten(1))


def use_one_block(monkeypatch):
    """Replace `choose_block_layout` by a function that returns a single block of all frames."""
    for module in ("attention", "conformer"):
        monkeypatch.setattr(
            f"transformers_parakeet.networks.{module}.choose_block_layout",
            lambda style, context, frames: BlockLayout(frames, frames),
        )


def attend(module, hidden, valid=None):
    """Return the output of an attention module without gradients."""
    with torch.no_grad():
        return module(hidden, ParakeetEncoderRelPositionalEncoding(module.config)(hidden), valid)[0]


@pytest.mark.parametrize(("style", "context"), CONTEXTS)
@pytest.mark.parametrize("frames", [1, 2, 23])
def test_a_context_equals_masked_attention(style, context, frames):
    module = attention(config_of(style, context))
    hidden = torch.randn(2, frames, 32, dtype=torch.float64)
    mask = torch.tensor([[may_attend(style, context, i, j) for j in range(frames)] for i in range(frames)])
    for row, output in zip(hidden, attend(module, hidden), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(output, plain_attention(module, row, mask), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("style", "context"), CONTEXTS)
@pytest.mark.parametrize("frames", [64, 137, 500])
def test_attention_in_blocks_equals_attention_in_one_block(style, context, frames, monkeypatch):
    module = attention(config_of(style, context))
    hidden = torch.randn(3, frames, 32, dtype=torch.float64)
    valid = torch.arange(frames) < torch.tensor([frames, frames // 2, 1])[:, None]
    blocked = attend(module, hidden, valid)
    use_one_block(monkeypatch)
    unblocked = attend(module, hidden, valid)
    torch.testing.assert_close(blocked[valid], unblocked[valid], atol=TOLERANCE, rtol=0)
    assert blocked.isfinite().all()


@pytest.mark.parametrize(("style", "context"), CONTEXTS)
def test_the_visible_keys_of_a_block_follow_the_rule_of_the_style(style, context):
    frames = 300
    layout = choose_block_layout(style, context, frames)
    visible = build_context_mask(style, context, layout, torch.device("cpu"))
    for query in range(frames):
        start = query // layout.block_size * layout.block_size
        row = visible[query - start]
        keys = {start - layout.keys_before + k for k in row.nonzero().flatten().tolist()}
        assert keys & set(range(frames)) == {k for k in range(frames) if may_attend(style, context, query, k)}


@pytest.mark.parametrize(("style", "context"), [c for c in CONTEXTS if min(c[1]) >= 0])
def test_the_number_of_scores_is_linear_in_the_number_of_frames(style, context):
    layouts = [choose_block_layout(style, context, frames) for frames in (2000, 8000)]
    sizes = [layout.num_keys * (layout.num_frames + layout.padding) for layout in layouts]
    assert sizes[1] < 4.2 * sizes[0]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_functions_agree_in_blocks(implementation):
    config = config_of("regular", [20, 20])
    module = attention(config, torch.float32)
    hidden = torch.randn(2, 200, 32)
    expected = attend(module, hidden)
    config._attn_implementation = implementation
    torch.testing.assert_close(attend(module, hidden), expected, atol=TOLERANCE, rtol=0)


def test_gradients_in_blocks_equal_gradients_in_one_block(monkeypatch):
    module = attention(config_of("regular", [12, 7]))
    inputs = torch.randn(1, 150, 32, dtype=torch.float64)
    gradients = []
    for in_one_block in (False, True):
        if in_one_block:
            use_one_block(monkeypatch)
        hidden = inputs.clone().requires_grad_()
        output, _ = module(hidden, ParakeetEncoderRelPositionalEncoding(module.config)(hidden))
        gradients.append(torch.autograd.grad(output.square().sum(), [hidden, *module.parameters()]))
    # the weights are computed in float32; measured: 1.6e-5 where gradients are up to 3
    for blocked, unblocked in zip(*gradients, strict=True):
        torch.testing.assert_close(blocked, unblocked, atol=5e-5, rtol=1e-5)


def limit_scores(monkeypatch, num_scores):
    """Limit the number of float32 scores of one head that are computed at once, in training and outside of it."""
    num_bytes = num_scores * attention_file.SCORE_TENSORS * 4 * 4
    monkeypatch.setattr(attention_file, "ATTENTION_WORKSPACE_BYTES", num_bytes)
    monkeypatch.setattr(attention_file, "STORED_SCORE_BYTES", num_bytes)


def output_and_gradients(module, inputs, valid):
    """Return the output at the valid frames, and the gradients of a function of it for the input and all weights."""
    hidden = inputs.clone().requires_grad_()
    output, _ = module(hidden, ParakeetEncoderRelPositionalEncoding(module.config)(hidden), valid)
    output = output[valid]
    return [output, *torch.autograd.grad(output.sin().sum(), [hidden, *module.parameters()])]


# at most 16 queries in a group: several clips, one clip, or a part of a clip
@pytest.mark.parametrize(
    "implementation",
    ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(("frames", "num_groups"), [(1, 1), (7, 2), (15, 3), (16, 3), (17, 6), (48, 9)])
def test_full_attention_in_groups_equals_attention_at_once(frames, num_groups, implementation, monkeypatch):
    if implementation == "flex_attention":
        # a second shape in one process makes shapes dynamic, for which torch 2.13 generates wrong C++ code on a CPU
        torch.compiler.reset()
    config = config_of("regular", [-1, -1])
    module = attention(config, torch.float32)
    config._attn_implementation = implementation
    hidden = torch.randn(3, frames, 32)
    valid = torch.arange(frames) < torch.tensor([frames, frames // 2 + 1, 1])[:, None]
    # flex attention without compilation has no backward pass on a CPU
    compare = output_and_gradients if implementation != "flex_attention" else attend
    at_once = compare(module, hidden, valid)
    calls = []
    monkeypatch.setattr(
        ParakeetEncoderAttention,
        "attend",
        lambda *args, method=ParakeetEncoderAttention.attend: calls.append(args[3]) or method(*args),
    )
    limit_scores(monkeypatch, 16 * frames)
    in_groups = compare(module, hidden, valid)
    # the backward pass computes the same groups again
    assert len(set(calls)) == num_groups
    # measured: outputs are equal, gradients differ by up to 1.1e-5 at a gradient of 36. At 1000 frames the output
    # differs by up to 2e-5 from float64, in groups and at once
    for computed, expected in zip(in_groups, at_once, strict=True):
        torch.testing.assert_close(computed, expected, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize(("style", "context"), [("regular", [-1, -1]), *CONTEXTS])
# several clips, several blocks, or several queries of one block in a group
@pytest.mark.parametrize("num_scores", [5 * 10**4, 3 * 10**4, 1000])
def test_every_context_in_groups_equals_attention_at_once(style, context, num_scores, monkeypatch):
    module = attention(config_of(style, context))
    hidden = torch.randn(3, 150, 32, dtype=torch.float64)
    valid = torch.arange(150) < torch.tensor([150, 75, 1])[:, None]
    at_once, at_once_without_gradients = output_and_gradients(module, hidden, valid), attend(module, hidden, valid)
    limit_scores(monkeypatch, 2 * num_scores)
    # measured: 6e-14 at a gradient of 82
    for computed, expected in zip(output_and_gradients(module, hidden, valid), at_once, strict=True):
        torch.testing.assert_close(computed, expected, atol=1e-10, rtol=1e-10)
    computed = attend(module, hidden, valid)
    torch.testing.assert_close(computed[valid], at_once_without_gradients[valid], atol=1e-10, rtol=0)
    assert computed.isfinite().all()


@pytest.mark.parametrize("frames", [1, 31, 32, 33, 63, 500])
def test_attention_without_gradients_equals_attention_with_gradients(frames):
    module = attention(config_of("regular", [-1, -1]))
    hidden = torch.randn(3, frames, 32, dtype=torch.float64)
    valid = torch.arange(frames) < torch.tensor([frames, frames // 2 + 1, 1])[:, None]
    # with gradients all queries form one group, and the mask is not applied in place
    expected = output_and_gradients(module, hidden, valid)[0]
    torch.testing.assert_close(attend(module, hidden, valid)[valid], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_queries_without_visible_keys_give_finite_output(dtype, implementation):
    config = config_of("regular", [-1, -1])
    module = attention(config, torch.float32)
    config._attn_implementation = implementation
    with torch.no_grad():
        # every query has the opposite direction of every key, so all dot products are negative
        module.k_proj.load_state_dict({name: -weight for name, weight in module.q_proj.state_dict().items()})
        module.bias_u.zero_()
    hidden = 5 * torch.randn(1, 1, 32).expand(2, 6, 32)
    output = attend(module.to(dtype), hidden.to(dtype), torch.tensor([[True] * 6, [False] * 6]))
    assert output.isfinite().all()
    # all keys have the same value, so the output does not depend on the weights
    expected = module.o_proj(module.v_proj(hidden.to(dtype)))
    # measured at values up to 40: 4e-6 in float32, 0.016 in float16, whose weights of 1/6 have a sum other than 1
    torch.testing.assert_close(output, expected, atol=0.05 if dtype == torch.float16 else 2e-5, rtol=0.0)


@pytest.mark.parametrize("separate", [False, True])
def test_global_tokens_in_groups_equal_those_at_once(separate, monkeypatch):
    fields = {"self_attention_model": "rel_pos_local_attn", "global_tokens": 2, "global_tokens_spacing": 40}
    module = attention(config_of("regular", [6, 6], global_attn_separate=separate, **fields))
    hidden = torch.randn(2, 150, 32, dtype=torch.float64)
    valid = torch.arange(150) < torch.tensor([150, 60])[:, None]
    at_once = output_and_gradients(module, hidden, valid), attend(module, hidden, valid)
    limit_scores(monkeypatch, 500)
    # measured: 3e-14 at a gradient of 49
    for computed, expected in zip(output_and_gradients(module, hidden, valid), at_once[0], strict=True):
        torch.testing.assert_close(computed, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(attend(module, hidden, valid), at_once[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_recomputation_of_a_group_uses_the_same_dropout(implementation, monkeypatch):
    config = config_of("regular", [-1, -1], attention_dropout=0.5)
    module = attention(config, torch.float32).train()
    config._attn_implementation = implementation
    hidden, valid = torch.randn(2, 40, 32), torch.arange(40) < torch.tensor([[40], [25]])
    limit_scores(monkeypatch, 400)
    torch.manual_seed(1)
    recomputed = output_and_gradients(module, hidden, valid)
    torch.manual_seed(1)
    monkeypatch.setattr(attention_file, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    stored = output_and_gradients(module, hidden, valid)
    torch.testing.assert_close(recomputed, stored, atol=0, rtol=0)


def test_attention_weights_are_returned_for_all_queries(monkeypatch):
    module = attention(config_of("regular", [-1, -1]), torch.float32)
    hidden = torch.randn(1, 40, 32)
    positions = ParakeetEncoderRelPositionalEncoding(module.config)(hidden)
    limit_scores(monkeypatch, 400)
    with torch.no_grad():
        assert module(hidden, positions)[1] is None
        weights = module(hidden, positions, output_attentions=True)[1]
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 40))


class LargestTensor(TorchDispatchMode):
    """Record the size in bytes of the largest storage that an operation returns."""

    num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Call the operation and look at its outputs."""
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else [outputs]:
            if isinstance(output, torch.Tensor):
                self.num_bytes = max(self.num_bytes, output.untyped_storage().nbytes())
        return outputs


@pytest.mark.parametrize("context", [[-1, -1], [-1, 0], [300, 300]])
def test_no_tensor_is_larger_than_the_workspace(context, monkeypatch):
    config = config_of("regular", context)
    module = attention(config, torch.float32)
    config._attn_implementation = "sdpa"
    # 256 KiB; the frames and the position keys are up to 205 KiB, the scores at once 10 MiB per tensor
    monkeypatch.setattr(attention_file, "ATTENTION_WORKSPACE_BYTES", 2**18)
    monkeypatch.setattr(attention_file, "STORED_SCORE_BYTES", 2**18)
    inputs = torch.randn(1, 800, 32)
    with LargestTensor() as forward:
        attend(module, inputs)
    assert forward.num_bytes <= 2**18
    stored = {}

    def store(tensor):
        stored[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = inputs.clone().requires_grad_()
    with LargestTensor() as both_passes:
        with torch.autograd.graph.saved_tensors_hooks(store, lambda tensor: tensor):
            output = module(hidden, ParakeetEncoderRelPositionalEncoding(config)(hidden))[0]
        output.sum().backward()
    assert both_passes.num_bytes <= 2**18
    # at most 8 tensors of the size of the frames: queries, keys, values, outputs of groups
    assert sum(stored.values()) <= 8 * 800 * 32 * 4


@pytest.mark.parametrize("mask", [[True, True, False], [False, True, True], [False, True, False], [True] * 3])
def test_a_padding_mask_in_place_equals_masked_fill(mask):
    scores, visible_mask = torch.randn(2, 4, 5, 3), torch.tensor([mask, mask[::-1]])[:, None, None]
    expected = scores.masked_fill(~visible_mask, attention_file.get_masked_score(scores.dtype))
    with torch.no_grad():
        assert torch.equal(attention_file.mask_scores(scores, visible_mask), expected)


@pytest.mark.parametrize(("length", "max_length", "lengths"), [(10, 4, [4, 4, 2]), (9, 4, [3] * 3), (5, 0, [1] * 5)])
def test_ranges_have_about_the_same_length(length, max_length, lengths):
    ranges = split_range(length, max_length)
    assert [len(part) for part in ranges] == lengths
    assert [index for part in ranges for index in part] == list(range(length))


def test_positions_of_an_uneven_local_context():
    # 2 before, 3 after: NeMo's table has rows of the positions 2 .. -3, its scores have columns of 3 .. -3
    positions, has_embedding = map_to_nemo_local_positions(torch.tensor([2, 1, 0, -1, -2, -3]), 2, 3)
    # column 1 gets row 1 (position 1), column 2 no row, columns 3 to 6 rows 2 to 5 (positions 0 to -3)
    assert has_embedding.tolist() == [True, False, True, True, True, True]
    assert positions[has_embedding].tolist() == [1, 0, -1, -2, -3]


def test_positions_of_an_even_local_context_keep_their_embedding():
    expected = torch.arange(7, -8, -1)
    positions, has_embedding = map_to_nemo_local_positions(expected, 7, 7)
    assert has_embedding.all()
    assert torch.equal(positions, expected)

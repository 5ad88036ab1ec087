"""Checks the int8 search for the largest output of a linear layer against float64."""

import copy
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformers_parakeet import ParakeetTDTConfig
from transformers_parakeet.networks import int8_search
from transformers_parakeet.networks.fast_linear import full_argmax
from transformers_parakeet.networks.int8_linear import has_int8_products
from transformers_parakeet.networks.int8_search import Int8Search, prepare_search
from transformers_parakeet.networks.transducer import ParakeetRNNTJointNetwork

ODD_SIZES = [1, 63, 500]
# 8193 tokens and 5 durations
VOCAB_SIZE, NUM_OUTPUTS, WIDTH = 8193, 8198, 640

pytestmark = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with exact int8 products")


def random_layer(num_outputs: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, bias and 24 rows as in a joint network, whose rows are outputs of a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.08 * torch.randn(num_outputs, width, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    return weight, bias, torch.randn(24, width, generator=generator).relu()


def float64_argmax(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """Return the indices of the largest outputs in float64."""
    return F.linear(hidden.double(), weight.double(), bias.double()).argmax(-1)


def search_argmax(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
    """Return the indices of the largest outputs that the int8 search finds."""
    return Int8Search(weight, bias).argmax(hidden, weight, bias)


# the largest output


@pytest.mark.parametrize(("num_outputs", "width"), [(1, 8), (2, 3), (37, 16), (1025, 640), (8193, 640)])
def test_the_largest_output_is_that_of_float64(num_outputs: int, width: int):
    for seed in range(5):
        weight, bias, hidden = random_layer(num_outputs, width, seed)
        expected = float64_argmax(weight, bias, hidden)
        assert torch.equal(search_argmax(weight, bias, hidden), expected)
        assert torch.equal(full_argmax(hidden, weight, bias), expected)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows", ODD_SIZES)
@pytest.mark.parametrize("num_outputs", ODD_SIZES)
def test_the_search_reads_no_uninitialised_memory(rows: int, num_outputs: int):
    weight, bias, _ = random_layer(num_outputs, 63)
    hidden = torch.randn(rows, 63, generator=torch.Generator().manual_seed(rows)).relu()
    assert torch.equal(search_argmax(weight, bias, hidden), float64_argmax(weight, bias, hidden))


def test_rounded_scores_alone_would_choose_other_outputs():
    weight, bias, _ = random_layer(8193, 640)
    hidden = torch.randn(400, 640, generator=torch.Generator().manual_seed(1)).relu()
    rounded = F.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16()).argmax(-1)
    expected = float64_argmax(weight, bias, hidden)
    assert not torch.equal(rounded, expected)
    assert torch.equal(search_argmax(weight, bias, hidden), expected)


def test_close_outputs_are_decided_in_float32():
    weight, bias, hidden = random_layer(2000, 640)
    # the second copy of every output is larger by much less than the resolution of int8
    doubled = torch.cat([weight, weight])
    bias = torch.cat([bias, bias + 2e-5])
    best = search_argmax(doubled, bias, hidden)
    assert torch.equal(best, float64_argmax(doubled, bias, hidden))
    assert bool((best >= 2000).all())


def test_the_first_of_equal_outputs_is_chosen():
    weight, bias, hidden = random_layer(500, 64)
    best = search_argmax(torch.cat([weight, weight, weight]), bias.repeat(3), hidden)
    assert torch.equal(best, float64_argmax(weight, bias, hidden))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shift", [-50.0, 0.0, 50.0])
def test_weights_of_any_scale_and_biases_of_any_size(scale: float, shift: float):
    weight, bias, hidden = random_layer(1025, 128)
    weight[7] *= 30.0
    bias[3] += 4.0
    weight, bias = scale * weight, scale * bias + shift
    assert torch.equal(search_argmax(weight, bias, hidden), float64_argmax(weight, bias, hidden))


# the blank, which is the last output


def search_blanks(weight: Tensor, bias: Tensor, hidden: Tensor) -> Tensor | None:
    """Return in which rows the search finds that the last output is the largest; `None` if it finds nothing."""
    outputs = Int8Search(weight, bias).search(hidden, weight, bias)
    if outputs is None:
        return None
    assert bool((outputs.tokens == torch.where(torch.from_numpy(outputs.is_blank), len(bias) - 1, 0).numpy()).all())
    return torch.from_numpy(outputs.is_blank)


@pytest.mark.parametrize(("num_outputs", "width"), [(2, 3), (65, 16), (1025, 640), (8193, 640)])
def test_rows_in_which_the_blank_is_the_largest_output(num_outputs: int, width: int):
    num_blanks = 0
    for seed in range(8):
        weight, bias, hidden = random_layer(num_outputs, width, seed)
        # the blank wins in half of the rows
        scores = F.linear(hidden.double(), weight.double(), bias.double())
        differences = scores[:, :-1].amax(1) - scores[:, -1]
        bias[-1] += differences.median().item()
        expected = float64_argmax(weight, bias, hidden) == num_outputs - 1
        # the median row is a tie within float32
        is_clear = (differences - differences.median()).abs() > 1e-4
        blanks = search_blanks(weight, bias, hidden)
        assert blanks is not None
        assert torch.equal(blanks[is_clear], expected[is_clear])
        num_blanks += int(expected.sum())
    assert 8 * 8 < num_blanks < 8 * 16


@pytest.mark.parametrize(("difference", "is_blank"), [(-2e-5, True), (0.0, False), (2e-5, False)])
def test_a_label_close_to_the_blank(difference: float, is_blank: bool):
    weight, bias, hidden = random_layer(2000, 640)
    # the blank is a copy of the best label of each row, whose other labels have much smaller scores
    bias[:-1] -= 30.0
    weight[11], bias[11] = weight[-1], bias[-1] + difference
    expected = float64_argmax(weight, bias, hidden) == 1999
    assert bool((expected == is_blank).all())
    blanks = search_blanks(weight, bias, hidden)
    assert blanks is not None
    assert torch.equal(blanks, expected)


def test_searches_without_a_decision():
    weight, bias, hidden = random_layer(4000, 64)
    for value in (torch.nan, torch.inf):
        broken = hidden.clone()
        broken[3, 5] = value
        assert search_blanks(weight, bias, broken) is None
    infinite = bias.clone()
    infinite[-1] = -torch.inf
    assert search_blanks(weight, infinite, hidden) is None
    # every output is the largest one within the error of int8
    assert search_blanks(weight[:1] + 1e-4 * weight, torch.zeros(4000), hidden) is None


def test_few_outputs_are_scored_again(monkeypatch):
    weight, bias, hidden = random_layer(8193, 640)
    num_candidates = []
    vecdot = torch.linalg.vecdot

    def counted(left: Tensor, right: Tensor) -> Tensor:
        num_candidates.append(len(left))
        return vecdot(left, right)

    monkeypatch.setattr(torch.linalg, "vecdot", counted)
    search_argmax(weight, bias, hidden)
    # measured: 15.7 per row
    assert len(hidden) < num_candidates[0] < 20 * len(hidden)


def test_all_outputs_are_scored_if_most_are_close(monkeypatch):
    weight, _, hidden = random_layer(4000, 64)
    monkeypatch.setattr(torch.linalg, "vecdot", None)
    # every output is the largest one within the error of int8
    similar = weight[:1] + 1e-4 * weight
    zeros = torch.zeros(4000)
    assert torch.equal(search_argmax(similar, zeros, hidden), F.linear(hidden, similar, zeros).max(-1).indices)


@pytest.mark.parametrize("num_outputs", [37, 4000])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e38])
def test_rows_that_are_not_finite(value: float, num_outputs: int):
    weight, bias, hidden = random_layer(num_outputs, 64)
    hidden[3, 5] = value
    assert torch.equal(search_argmax(weight, bias, hidden), F.linear(hidden, weight, bias).max(-1).indices)


def test_the_search_is_used_for_large_weights_on_a_cpu_with_int8_products(monkeypatch):
    assert int8_search.MIN_SEARCH_WEIGHTS == 2048 * 512
    assert Int8Search.is_faster(torch.zeros(2048, 512))
    assert not Int8Search.is_faster(torch.zeros(2048, 512, dtype=torch.bfloat16))
    assert not Int8Search.is_faster(torch.zeros(2047, 512))
    assert not Int8Search.is_faster(torch.zeros(2048, 512, dtype=torch.float64))
    assert not Int8Search.is_faster(torch.zeros(2048, 512, device="meta"))
    with torch.inference_mode():
        assert not Int8Search.is_faster(torch.zeros(2048, 512))
    monkeypatch.setattr(int8_search, "has_int8_products", lambda: False)
    assert not Int8Search.is_faster(torch.zeros(2048, 512))


@pytest.mark.parametrize("activation", [torch.tanh, torch.sigmoid, torch.relu, torch.neg, torch.zeros_like])
def test_activations_of_any_sign(activation):
    weight, bias, _ = random_layer(1025, 640)
    hidden = activation(torch.randn(24, 640, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(search_argmax(weight, bias, hidden), float64_argmax(weight, bias, hidden))


def test_the_error_bound_holds_for_all_outputs():
    weight, bias, hidden = random_layer(500, 64)
    # one weight that is much larger than the others makes the int8 numbers of its output coarse
    weight[3, 5] = 9.0
    rough_scores = Int8Search(weight, bias)._score(hidden)
    scores, error_bounds = rough_scores.scores, rough_scores.errors
    exact = F.linear(hidden.double(), weight.double(), bias.double())
    errors = (scores.flatten(1)[:, :500] - exact).abs()
    assert bool((errors.amax(1) <= error_bounds).all())
    # the bound is not more than 10 times the largest error, measured: 5.8 times
    assert bool((errors.amax(1) >= error_bounds / 10).any())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 2.55, (0.01, 0)), (0.5, 2.55, (0.01, 0)), (-1.0, 1.55, (0.01, 100)), (-2.55, -1.0, (0.01, 255)),
     (0.0, 0.0, (1.0, 0)), (0.0, torch.inf, (1.0, 0)), (torch.nan, torch.nan, (1.0, 0))],
)  # fmt: skip
def test_scale_and_zero_point_of_activations(low: float, high: float, expected: tuple[float, int]):
    assert int8_search.choose_scale(low, high) == pytest.approx(expected)


def test_best_candidates():
    select = int8_search.select_best_candidates
    # row 0: output 9 is better; row 1: outputs 8 and 2 are equal
    assert select([0, 0, 1, 1], [4, 9, 8, 2], [1.0, 2.0, 3.0, 3.0], 2) == [9, 2]
    assert select([0, 0], [4, 9], [1.0, 2.0], 2) is None
    assert select([0], [4], [torch.nan], 1) is None


# one search per layer


def output_layer(seed: int = 0) -> nn.Linear:
    """Return the output layer of a joint network of 300 outputs."""
    torch.manual_seed(seed)
    return nn.Linear(64, 300)


def layer_argmax(layer: nn.Linear, hidden: Tensor) -> Tensor:
    """Return the indices of the largest outputs, from the search that is held for a layer."""
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return prepare_search(layer, 300).argmax(hidden, weight, bias)


def step_of_an_optimizer(layer: nn.Linear) -> None:
    """Train the layer for one step."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.3)
    layer(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()


def loading_of_a_state_dict(layer: nn.Linear) -> None:
    """Load the weights of another layer."""
    layer.load_state_dict(output_layer(seed=1).state_dict())


def assignment_to_data(layer: nn.Linear) -> None:
    """Replace the storage of the weight, which leaves the version counter of the parameter."""
    layer.weight.data = output_layer(seed=1).weight.data


def update_through_data(layer: nn.Linear) -> None:
    """Change the weight in place without raising its version counter, as exponential moving averages do."""
    layer.weight.data.mul_(-1.0)


def update_of_one_row_through_data(layer: nn.Linear) -> None:
    """Change the weights of one output without raising the version counter."""
    layer.weight.data[123] = 3.0


def update_of_the_bias(layer: nn.Linear) -> None:
    """Change the bias of one output without raising the version counter."""
    layer.bias.data[77] += 9.0


def new_parameter(layer: nn.Linear) -> None:
    """Replace the parameter itself."""
    layer.weight = nn.Parameter(output_layer(seed=1).weight.detach())


def conversion_and_back(layer: nn.Linear) -> None:
    """Round the weights by a conversion of the module."""
    layer.to(torch.float16).to(torch.float32)


UPDATES = [
    step_of_an_optimizer, loading_of_a_state_dict, assignment_to_data, update_through_data,
    update_of_one_row_through_data, update_of_the_bias, new_parameter, conversion_and_back,
]  # fmt: skip


def test_a_search_is_built_once_per_layer():
    layer = output_layer()
    search = prepare_search(layer, 300)
    assert prepare_search(layer, 300) is search
    assert prepare_search(layer, 299) is not search
    assert prepare_search(output_layer(), 300) is not search


@pytest.mark.parametrize("update", UPDATES, ids=lambda update: update.__name__)
def test_a_search_is_built_again_when_the_layer_has_changed(update):
    layer, hidden = output_layer(), torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).relu()
    search, best = prepare_search(layer, 300), layer_argmax(layer, hidden)
    update(layer)
    assert prepare_search(layer, 300) is not search
    expected = float64_argmax(layer.weight, layer.bias, hidden)
    assert torch.equal(layer_argmax(layer, hidden), expected)
    # rounding to float16 may leave the indices as they are
    assert update is conversion_and_back or not torch.equal(expected, best)


def test_a_copied_layer_has_a_separate_search():
    layer = output_layer()
    search = prepare_search(layer, 300)
    twin = copy.deepcopy(layer)
    assert prepare_search(twin, 300) is not search
    assert prepare_search(layer, 300) is search


def test_a_search_is_freed_with_its_layer():
    layer = output_layer()
    num_searches = len(int8_search._searches)
    search = weakref.ref(prepare_search(layer, 300))
    assert len(int8_search._searches) == num_searches + 1
    assert search() is not None
    del layer
    gc.collect()
    assert search() is None
    assert len(int8_search._searches) == num_searches


def test_a_search_does_not_keep_the_weight_alive():
    layer = output_layer()
    search = prepare_search(layer, 300)
    # the packed weight is a oneDNN tensor, which has no storage
    assert search.packed_weight.is_mkldnn
    tensors = {name: value for name, value in vars(search).items() if isinstance(value, Tensor) and not value.is_mkldnn}
    storages = {name: tensor.untyped_storage() for name, tensor in tensors.items()}
    layer_storages = (layer.weight.untyped_storage().data_ptr(), layer.bias.untyped_storage().data_ptr())
    assert not any(storage.data_ptr() in layer_storages for storage in storages.values())
    assert storages["weight_sample"].nbytes() == 300 * int8_search.SAMPLE_WIDTH * 4


def test_threads_share_one_search():
    layer, hidden = output_layer(), torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).relu()
    expected = float64_argmax(layer.weight, layer.bias, hidden)
    with ThreadPoolExecutor(8) as pool:
        searches = list(pool.map(lambda _: prepare_search(layer, 300), range(64)))
        results = list(pool.map(lambda _: layer_argmax(layer, hidden), range(64)))
    assert len(set(map(id, searches))) == 1
    assert all(torch.equal(result, expected) for result in results)


# the joint network


@pytest.fixture(scope="module")
def joint() -> ParakeetRNNTJointNetwork:
    """A joint network that is large enough for the search."""
    torch.manual_seed(0)
    config = ParakeetTDTConfig(decoder_hidden_size=WIDTH)
    network = ParakeetRNNTJointNetwork(config, NUM_OUTPUTS).eval()
    nn.init.normal_(network.head.weight, std=0.08)
    return network


@pytest.mark.parametrize("rows", [1, 4, 63, 500])
def test_the_best_outputs_of_the_joint_are_those_of_its_scores(rows: int, joint, monkeypatch):
    monkeypatch.setattr(Int8Search, "is_faster", staticmethod(lambda weight: True))
    generator = torch.Generator().manual_seed(rows)
    encoder_states = torch.randn(rows, 1, WIDTH, generator=generator)
    predictor_states = torch.randn(rows, 1, WIDTH, generator=generator)
    attributes = {name: dict(vars(module)) for name, module in joint.named_modules()}
    with torch.no_grad():
        best_durations, best_tokens, search_tokens = joint.build_argmax_functions(VOCAB_SIZE)
        scores = joint.double()(predictor_states.double(), encoder_states.double())
        joint.float()
        durations = best_durations(encoder_states, predictor_states)
        tokens = best_tokens(encoder_states, predictor_states)
        searched = search_tokens(encoder_states, predictor_states)
    is_blank = torch.from_numpy(searched.tokens).view(tokens.shape) == VOCAB_SIZE - 1
    assert torch.equal(is_blank, tokens == VOCAB_SIZE - 1)
    assert torch.equal(tokens, scores[..., :VOCAB_SIZE].argmax(-1))
    assert torch.equal(durations, scores[..., VOCAB_SIZE:].argmax(-1))
    assert {name: dict(vars(module)) for name, module in joint.named_modules()} == attributes


def test_a_wrapped_output_layer_has_no_argmax_functions():
    network = ParakeetRNNTJointNetwork(ParakeetTDTConfig(vocab_size=13, blank_token_id=12, decoder_hidden_size=8), 18)
    assert network.build_argmax_functions(13)[0] is not None
    network.head.register_forward_hook(lambda module, inputs, output: output)
    assert network.build_argmax_functions(13) == (None, None, None)


def test_rnnt_has_no_best_durations():
    network = ParakeetRNNTJointNetwork(ParakeetTDTConfig(vocab_size=13, blank_token_id=12, decoder_hidden_size=8), 13)
    assert network.build_argmax_functions(13)[0] is None

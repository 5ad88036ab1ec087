"""The LSTM of the prediction network in int8, compared with the float LSTM at odd sizes, and its cache."""

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from transformers_parakeet import ParakeetRNNTConfig
from transformers_parakeet.networks import int8_lstm
from transformers_parakeet.networks.int8_linear import MAX_INT8, has_int8_products, quantize_rows
from transformers_parakeet.networks.int8_lstm import Int8Lstm, Int8Product, prepare_int8_lstm
from transformers_parakeet.networks.transducer import ParakeetRNNTDecoder

needs_int8 = pytest.mark.skipif(not has_int8_products(), reason="needs a CPU with VNNI or AMX instructions")

VOCAB = 50
# (batch, width, layers)
SIZES = [(1, 63, 1), (5, 130, 3), (63, 1, 2), (2, 640, 2)]


def build_decoder(width, layers=2, dtype=torch.float32, seed=0):
    """Return a random prediction network whose embeddings have different sizes, and one of which is 0."""
    torch.manual_seed(seed)
    config = ParakeetRNNTConfig(
        vocab_size=VOCAB, blank_token_id=VOCAB - 1, decoder_hidden_size=width, num_decoder_layers=layers
    )
    decoder = ParakeetRNNTDecoder(config).eval()
    with torch.no_grad():
        for name, parameter in decoder.lstm.named_parameters():
            parameter.normal_(std=1.5 * width**-0.5 if "weight" in name else 0.3)
        decoder.embedding.weight.mul_(torch.logspace(-1, 1, VOCAB)[:, None])
        decoder.embedding.weight[-1] = 0
    return decoder.to(dtype)


def random_labels(batch, length=12):
    """Return (length, batch) labels that start with the blank."""
    labels = torch.randint(VOCAB, (length, batch), generator=torch.Generator().manual_seed(batch))
    labels[0] = VOCAB - 1
    return labels


def run_steps(decoder, labels, uses_int8):
    """Return the (length, B, J) predictor states of (length, B) labels, and the last state of the LSTM."""
    decoder.uses_int8, state, outputs = uses_int8, None, []
    with torch.no_grad():
        for step_labels in labels:
            output, state = decoder.step(step_labels, state)
            outputs.append(output)
    return torch.stack(outputs), state


@needs_int8
@pytest.mark.parametrize("size", [(1, 64, 256), (63, 511, 131), (500, 130, 7), (1, 1, 1)])
def test_the_product_has_the_bits_of_the_rounded_exact_product(size, poisoned_memory):
    num_rows, num_inputs, num_outputs = size
    generator = torch.Generator().manual_seed(1)
    rows = torch.rand(num_rows, num_inputs, generator=generator) * 2 - 1
    rows[0, 0], rows[-1, -1] = 1.0, -1.0
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    row_values = (rows.double() * MAX_INT8).round()
    weight_values, scales = quantize_rows(weight)
    exact_sums = row_values @ weight_values.double().T
    expected = exact_sums.float() * (scales[:, 0] / MAX_INT8)
    assert torch.equal(Int8Product(weight).multiply(rows), expected)
    assert Int8Product(weight).multiply(rows[:0]).shape == (0, num_outputs)


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "width", "layers"), SIZES)
def test_steps_differ_from_float_steps_by_the_rounding(batch, width, layers, dtype, poisoned_memory):
    decoder, labels = build_decoder(width, layers, dtype), random_labels(batch)
    expected = run_steps(copy.deepcopy(decoder).double(), labels, uses_int8=False)[0]
    errors = (run_steps(decoder, labels, uses_int8=True)[0].double() - expected).abs()
    assert expected.abs().max() > 0.3
    # measured: 0.016 and 0.0024
    assert errors.max() < 0.03
    assert errors.mean() < 0.005


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [63, 128, 640])
def test_a_row_has_the_same_bits_alone_and_in_every_batch(width, dtype):
    decoder, labels = build_decoder(width, dtype=dtype), random_labels(33)
    outputs, (hidden, cells) = run_steps(decoder, labels, uses_int8=True)
    assert hidden.dtype == cells.dtype == torch.float32
    assert outputs.dtype == dtype
    for rows in ([0], [7], [32], [3, 1], list(range(10, 30))):
        _, (row_hidden, row_cells) = run_steps(decoder, labels[:, rows], uses_int8=True)
        assert torch.equal(row_hidden, hidden[:, rows])
        assert torch.equal(row_cells, cells[:, rows])


@needs_int8
def test_a_step_of_some_rows_does_not_change_its_input_state():
    decoder, labels = build_decoder(64), random_labels(5)
    state = run_steps(decoder, labels, uses_int8=True)[1]
    before = [tensor.clone() for tensor in state]
    expected = decoder.step(labels[0], state)[1]
    assert all(torch.equal(tensor, copied) for tensor, copied in zip(state, before, strict=True))
    rows = torch.tensor([4, 0])
    selected = decoder.step(labels[0, rows], tuple(tensor[:, rows] for tensor in state))[1]
    assert all(torch.equal(tensor, whole[:, rows]) for tensor, whole in zip(selected, expected, strict=True))


@needs_int8
def test_the_rounded_weights_are_built_once_and_again_when_a_weight_changes():
    decoder, labels = build_decoder(64), random_labels(3)
    first = prepare_int8_lstm(decoder.lstm)
    assert prepare_int8_lstm(decoder.lstm) is first
    before = run_steps(decoder, labels, uses_int8=True)[0]
    with torch.no_grad():
        decoder.lstm.weight_hh_l1.mul_(0.5)
    assert prepare_int8_lstm(decoder.lstm) is not first
    changed = run_steps(decoder, labels, uses_int8=True)[0]
    assert not torch.equal(changed, before)
    decoder.load_state_dict(build_decoder(64).state_dict())
    assert torch.equal(run_steps(decoder, labels, uses_int8=True)[0], before)
    decoder.lstm.bias_ih_l0 = nn.Parameter(decoder.lstm.bias_ih_l0 + 1)
    assert not torch.equal(run_steps(decoder, labels, uses_int8=True)[0], before)


@needs_int8
def test_the_rounded_weights_are_deleted_with_the_lstm():
    decoder = build_decoder(64)
    run_steps(decoder, random_labels(3), uses_int8=True)
    lstm, int8 = weakref.ref(decoder.lstm), weakref.ref(prepare_int8_lstm(decoder.lstm))
    assert int8() is not None
    del decoder
    gc.collect()
    assert lstm() is None
    assert int8() is None


@needs_int8
def test_copies_have_the_same_bits_and_contain_no_rounded_weights():
    decoder, labels = build_decoder(64), random_labels(3)
    size = len(pickle.dumps(decoder))
    expected = run_steps(decoder, labels, uses_int8=True)[0]
    assert abs(len(pickle.dumps(decoder)) - size) < 64
    assert decoder.state_dict().keys() == build_decoder(64).state_dict().keys()
    for copied in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        assert copied.uses_int8
        assert torch.equal(run_steps(copied, labels, uses_int8=True)[0], expected)


@needs_int8
def test_threads_share_the_rounded_weights(monkeypatch):
    built = []
    monkeypatch.setattr(int8_lstm, "Int8Lstm", lambda lstm: built.append(lstm) or Int8Lstm(lstm))
    decoder, labels = build_decoder(64), random_labels(7)
    with ThreadPoolExecutor(8) as pool:
        outputs = list(pool.map(lambda _: run_steps(decoder, labels, uses_int8=True)[0], range(16)))
    assert len(built) == 1
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@needs_int8
def test_weights_that_were_created_in_inference_mode():
    with torch.inference_mode():
        decoder = build_decoder(64)
        outputs = run_steps(decoder, random_labels(3), uses_int8=True)[0]
    assert torch.equal(outputs, run_steps(build_decoder(64), random_labels(3), uses_int8=True)[0])


@needs_int8
def test_gradients_are_not_computed():
    decoder = build_decoder(64)
    decoder.uses_int8 = True
    _, state = decoder.step(random_labels(3)[1], None)
    assert not any(tensor.requires_grad for tensor in state)


@needs_int8
def test_a_modified_lstm_is_called():
    decoder, labels = build_decoder(64), random_labels(3)
    expected = run_steps(decoder, labels, uses_int8=False)[0]
    calls = []
    decoder.lstm.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(run_steps(decoder, labels, uses_int8=True)[0], expected, rtol=0.0, atol=1e-5)
    assert len(calls) == len(labels)

"""Checks the prediction network and the joint network against their equations, in steps and on whole sequences."""

import pytest
import torch
from torch import Tensor

from transformers_parakeet import ParakeetRNNTConfig, ParakeetTDTConfig
from transformers_parakeet.networks.transducer import ParakeetRNNTDecoder, ParakeetRNNTJointNetwork

VOCAB, WIDTH, BATCH, LENGTH = 13, 8, 5, 9
# float64 against float64 in another order of operations; measured: 4e-16
EXACT = {"rtol": 0.0, "atol": 1e-13}


def small_config(**kwargs) -> ParakeetRNNTConfig:
    """Return the configuration of a small RNN-T model."""
    fields = {"vocab_size": VOCAB, "blank_token_id": VOCAB - 1, "decoder_hidden_size": WIDTH, "num_decoder_layers": 2}
    return ParakeetRNNTConfig(**{**fields, **kwargs})


def small_decoder(**kwargs) -> ParakeetRNNTDecoder:
    """Return a random prediction network in float64."""
    torch.manual_seed(3)
    return ParakeetRNNTDecoder(small_config(**kwargs)).double().eval()


def small_tokens() -> Tensor:
    """Return (BATCH, LENGTH) token ids that start with the blank."""
    tokens = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = VOCAB - 1
    return tokens


@pytest.mark.parametrize("joint_width", [None, 3, 24])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_steps_equal_a_pass_over_the_whole_sequence(layers: int, joint_width: int | None):
    decoder, tokens = small_decoder(num_decoder_layers=layers, joint_hidden_size=joint_width), small_tokens()
    predictor_states = decoder(tokens)
    assert predictor_states.shape == (BATCH, LENGTH, joint_width or WIDTH)
    state = None
    for position in range(LENGTH):
        output, state = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(output, predictor_states[:, position], **EXACT)
    assert [tensor.shape for tensor in state] == [(layers, BATCH, WIDTH)] * 2
    _, (hidden, cell) = decoder.lstm(decoder.embedding(tokens))
    torch.testing.assert_close(state[0], hidden, **EXACT)
    torch.testing.assert_close(state[1], cell, **EXACT)


@pytest.mark.parametrize("rows", [1, 2, 4, 5, 70])
def test_float32_steps_equal_the_sequence_within_float32_rounding(rows: int):
    # products are computed differently for one row, for few rows and for many
    decoder, tokens = small_decoder().float(), small_tokens().repeat(14, 1)[:rows]
    predictor_states, state = decoder(tokens), None
    for position in range(LENGTH):
        output, state = decoder.step(tokens[:, position], state)
        # measured: 6e-8
        torch.testing.assert_close(output, predictor_states[:, position], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_follows_the_lstm_equations(layers: int):
    decoder, tokens = small_decoder(num_decoder_layers=layers, joint_hidden_size=6), small_tokens()
    states = [(torch.zeros(BATCH, WIDTH).double(), torch.zeros(BATCH, WIDTH).double()) for _ in range(layers)]
    state = None
    for position in range(LENGTH):
        value = decoder.embedding.weight[tokens[:, position]]
        for layer, (hidden, cell) in enumerate(states):
            weights = {name: getattr(decoder.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh")}
            biases = getattr(decoder.lstm, f"bias_ih_l{layer}") + getattr(decoder.lstm, f"bias_hh_l{layer}")
            gates = value @ weights["weight_ih"].T + hidden @ weights["weight_hh"].T + biases
            # order of torch and NeMo: input, forget, cell, output
            input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=-1)
            cell = forget_gate.sigmoid() * cell + input_gate.sigmoid() * candidate.tanh()
            value = output_gate.sigmoid() * cell.tanh()
            states[layer] = value, cell
        output, state = decoder.step(tokens[:, position], state)
        torch.testing.assert_close(
            output, value @ decoder.decoder_projector.weight.T + decoder.decoder_projector.bias, **EXACT
        )


def test_a_step_of_some_rows_equals_a_step_of_all_rows():
    decoder, tokens = small_decoder(), small_tokens()
    _, state = decoder.step(tokens[:, 0], None)
    all_states, (hidden, cell) = decoder.step(tokens[:, 1], state)
    rows = torch.tensor([3, 0])
    states, (row_hidden, row_cell) = decoder.step(tokens[rows, 1], tuple(tensor[:, rows] for tensor in state))
    torch.testing.assert_close(states, all_states[rows], **EXACT)
    torch.testing.assert_close(row_hidden, hidden[:, rows], **EXACT)
    torch.testing.assert_close(row_cell, cell[:, rows], **EXACT)


def test_a_step_does_not_change_its_input_state():
    decoder, tokens = small_decoder(), small_tokens()
    _, state = decoder.step(tokens[:, 0], None)
    before = [tensor.clone() for tensor in state]
    decoder.step(tokens[:, 1], state)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(state, before, strict=True))


@pytest.mark.parametrize(("name", "act"), [("relu", torch.relu), ("tanh", torch.tanh), ("sigmoid", torch.sigmoid)])
def test_the_joint_applies_the_activation_to_the_sum(name: str, act):
    torch.manual_seed(0)
    joint = ParakeetRNNTJointNetwork(small_config(hidden_act=name, joint_hidden_size=5)).double().eval()
    # (B, N, 1, J) and (B, 1, U+1, J)
    encoder_states, predictor_states = torch.randn(2, 4, 1, 5).double(), torch.randn(2, 1, 3, 5).double()
    logits = joint(predictor_states, encoder_states)
    assert logits.shape == (2, 4, 3, VOCAB)
    for row, frame, position in ((0, 0, 0), (1, 3, 2), (0, 2, 1)):
        hidden = act(encoder_states[row, frame, 0] + predictor_states[row, 0, position])
        torch.testing.assert_close(logits[row, frame, position], joint.head.weight @ hidden + joint.head.bias, **EXACT)


def test_shape_of_the_output_layer_of_the_joint():
    assert ParakeetRNNTJointNetwork(small_config()).head.weight.shape == (VOCAB, WIDTH)
    config = ParakeetTDTConfig(vocab_size=VOCAB, blank_token_id=VOCAB - 1, joint_hidden_size=20, durations=[0, 1, 5])
    assert ParakeetRNNTJointNetwork(config, VOCAB + 3).head.weight.shape == (VOCAB + 3, 20)


def test_dropout_is_applied_in_training_only():
    decoder, tokens = small_decoder(decoder_dropout=0.5), small_tokens()
    torch.testing.assert_close(decoder(tokens), small_decoder()(tokens), **EXACT)
    assert (decoder.train()(tokens) - small_decoder()(tokens)).abs().max() > 0.01
    joint = ParakeetRNNTJointNetwork(small_config(joint_dropout=0.5)).train()
    # half of the hidden units are 0 and the others are doubled
    torch.nn.init.eye_(joint.head.weight)
    torch.nn.init.zeros_(joint.head.bias)
    outputs = joint(torch.zeros(200, WIDTH), torch.ones(200, WIDTH))[:, :WIDTH]
    assert set(outputs.unique().tolist()) == {0.0, 2.0}

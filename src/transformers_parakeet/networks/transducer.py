"""The two networks of a transducer beside the encoder: the prediction network and the joint network.

The decoding loop that feeds tokens back is in the sub-package `decoding`, the loss in the sub-package `losses`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..configuration_parakeet import ParakeetRNNTConfig
from .fast_linear import (
    MIN_SEARCH_ROWS,
    Bfloat16Search,
    add_gate_products,
    few_rows_linear,
    is_plain,
    plain_argmax,
    prepare_search,
    read_affine_layer,
)

# hidden and cell state of all LSTM layers, each (layers, B, P)
LSTMState = tuple[Tensor, Tensor]

# encoder states (R, K, J) and predictor states (R, 1, J) -> (R, K) indices of the best outputs
BestOutputs = Callable[[Tensor, Tensor], Tensor]


class ParakeetRNNTDecoder(nn.Module):
    """Prediction network: embedding, LSTM and projection to the joint width (Graves, arXiv 1211.3711, section 2).

    Args:
        config: vocabulary size, width P, number of LSTM layers, joint width J and dropout.
    """

    def __init__(self, config: ParakeetRNNTConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.dropout = config.decoder_dropout
        self.embedding = nn.Embedding(config.vocab_size, width)
        # torch warns about dropout between layers if there is only one
        lstm_dropout = config.decoder_dropout if config.num_decoder_layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, config.num_decoder_layers, batch_first=True, dropout=lstm_dropout)
        self.decoder_projector = nn.Linear(width, config.joint_hidden_size or width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the predictor states of whole label sequences, for training.

        Args:
            input_ids: (B, U+1) the blank, then the labels.

        Returns:
            (B, U+1, J) predictor states.
        """
        hidden, _ = self.lstm(self.embedding(input_ids))
        return self.decoder_projector(F.dropout(hidden, self.dropout, self.training))

    def step(self, tokens: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        """Compute the predictor states after one more label, for decoding.

        A plain LSTM is computed cell by cell, because `nn.LSTM` copies its weights to a packed layout in every call.

        Args:
            tokens: (B,) the last label of each hypothesis, or the blank at the start.
            state: LSTM state before the step; `None` at the start.

        Returns:
            (B, J) predictor states and the LSTM state after the step.
        """
        hidden = self.embedding(tokens)
        if not is_plain(self.lstm, nn.LSTM):
            output, state = self.lstm(hidden[:, None], state)
            return self.decoder_projector(output[:, 0]), state
        if state is None:
            zeros = hidden.new_zeros(self.lstm.num_layers, len(tokens), hidden.shape[1])
            state = (zeros, zeros)
        hidden_states, cell_states = [], []
        for layer in range(self.lstm.num_layers):
            hidden, cell = self._lstm_cell(layer, hidden, state[0][layer], state[1][layer])
            hidden_states.append(hidden)
            cell_states.append(cell)
        return self.decoder_projector(hidden), (torch.stack(hidden_states), torch.stack(cell_states))

    def _lstm_cell(self, layer: int, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Compute one layer of the LSTM for one label, with the equations of `nn.LSTM`.

        Args:
            layer: index of the LSTM layer.
            inputs: (B, P) embeddings, or the hidden states of the layer below.
            hidden: (B, P) hidden states of this layer before the step.
            cell: (B, P) cell states of this layer before the step.

        Returns:
            (B, P) hidden states and (B, P) cell states after the step.
        """
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(self.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        # (4, B, P) in torch's order: input gate, forget gate, candidate, output gate
        gates = (bias_ih + bias_hh).view(4, 1, -1)
        gates = add_gate_products(add_gate_products(gates, inputs, weight_ih), hidden, weight_hh)
        (input_gate, forget_gate), candidate, output_gate = gates[:2].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
        cell = torch.addcmul(input_gate * candidate, forget_gate, cell)
        return output_gate * cell.tanh(), cell


class ParakeetRNNTJointNetwork(nn.Module):
    """Joint network: activation of the sum of an encoder state and a predictor state, then a linear output layer.

    Args:
        config: joint width J, activation, dropout and vocabulary size.
        num_outputs: outputs of the layer, V for RNN-T (also with `None`) and V + D for TDT.
    """

    def __init__(self, config: ParakeetRNNTConfig, num_outputs: int | None = None) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = config.joint_dropout
        self.head = nn.Linear(config.joint_hidden_size or config.decoder_hidden_size, num_outputs or config.vocab_size)

    def forward(self, decoder_hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Score all tokens, and for TDT all durations.

        Args:
            decoder_hidden_states: (..., J) predictor states.
            encoder_hidden_states: (..., J) projected encoder states; the two broadcast.

        Returns:
            (..., V) or (..., V + D) logits.
        """
        hidden = self._combine(encoder_hidden_states, decoder_hidden_states)
        return self.head(F.dropout(hidden, self.dropout, self.training))

    def _combine(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Return the (..., J) input of the output layer for (..., J) encoder and predictor states that broadcast."""
        return self.activation(encoder_states + predictor_states)

    def output_layer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the output layer for the fused loss; gradients pass through both to the parameters.

        Args:
            like: an input of the joint network, which gives dtype and device.

        Returns:
            (V [+ D], J) weight and (V [+ D],) bias.
        """
        if is_plain(self.head, nn.Linear):
            return self.head.weight, self.head.bias
        return read_affine_layer(self.head, self.head.in_features, like)

    def score(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Score several frames of each hypothesis in decoding, without dropout.

        Args:
            encoder_states: (R, K, J) projected encoder states of K frames for each of R hypotheses.
            predictor_states: (R, 1, J).

        Returns:
            (R, K, V [+ D]) logits.
        """
        if not is_plain(self.head, nn.Linear):
            return self(predictor_states, encoder_states)
        hidden = self._combine(encoder_states, predictor_states)
        return few_rows_linear(hidden.flatten(0, 1), self.head.weight, self.head.bias).unflatten(0, hidden.shape[:2])

    def fast_argmax(self, vocab_size: int) -> tuple[BestOutputs | None, BestOutputs | None]:
        """Return functions that find the best outputs faster than `score` does, for one call of `generate`.

        Args:
            vocab_size: number of tokens V with the blank; the outputs after them are durations.

        Returns:
            A function for the best durations and one for the best tokens, each called with encoder states (R, K, J)
            and predictor states (R, 1, J). The first is `None` for RNN-T. The second is `None` on a device without
            fast bfloat16 products. Both are `None` if the output layer is wrapped, for example by LoRA.
        """
        if not is_plain(self.head, nn.Linear):
            return None, None
        weight, bias = self.head.weight, self.head.bias

        @cache
        def search() -> Bfloat16Search:
            # on first use only, because decoding with confidence needs all scores
            return prepare_search(self.head, vocab_size)

        def best_durations(encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
            hidden = self._combine(encoder_states, predictor_states)
            return F.linear(hidden, weight[vocab_size:], bias[vocab_size:]).argmax(-1)

        def best_tokens(encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
            hidden = self._combine(encoder_states, predictor_states)
            rows = hidden.flatten(0, 1)
            argmax = plain_argmax if len(rows) < MIN_SEARCH_ROWS else search().argmax
            return argmax(rows, weight[:vocab_size], bias[:vocab_size]).unflatten(0, hidden.shape[:2])

        has_durations = len(weight) > vocab_size
        return best_durations if has_durations else None, best_tokens if Bfloat16Search.is_faster(weight) else None

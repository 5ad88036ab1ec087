"""Prediction network and joint network of a transducer.

The decoding loop that calls them is in the sub-package `decoding`, the loss in the sub-package `losses`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..configuration_parakeet import ParakeetRNNTConfig
from .fast_linear import is_unmodified, probe_affine_layer, small_batch_linear
from .int8_lstm import prepare_int8_lstm
from .int8_search import Int8Search, prepare_search
from .searched_outputs import SearchedOutputs

# hidden states and cell states of all LSTM layers, each (num_layers, B, width of the prediction network)
LstmState = tuple[Tensor, Tensor]

# maps encoder states (R, num_frames, J) and predictor states (R, 1, J) of R hypotheses to the (R, num_frames) indices
# of the best outputs
ArgmaxFunction = Callable[[Tensor, Tensor], Tensor]
# decides for the same states where the blank is the best token, and returns rough scores of R * num_frames frames;
# `None` if all scores must be computed
SearchFunction = Callable[[Tensor, Tensor], SearchedOutputs | None]


class ParakeetRNNTDecoder(nn.Module):
    """Prediction network: embedding, LSTM and projection to the joint width (Graves, arXiv 1211.3711, section 2).

    Args:
        config: configuration of the transducer. It gives the vocabulary size, the width and number of the LSTM layers,
            the joint width J and the dropout probability.
    """

    # Whether `step` computes the products of the LSTM in int8; `quantization_parakeet.py` sets this for int8 models.
    # The weights stay float weights, and `forward` uses them.
    uses_int8 = False

    def __init__(self, config: ParakeetRNNTConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.dropout = config.decoder_dropout
        self.embedding = nn.Embedding(config.vocab_size, width)
        # PyTorch warns if a single-layer LSTM has dropout, because dropout is applied between layers
        lstm_dropout = config.decoder_dropout if config.num_decoder_layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, config.num_decoder_layers, batch_first=True, dropout=lstm_dropout)
        self.decoder_projector = nn.Linear(width, config.joint_hidden_size or width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Compute the predictor states of complete label sequences, for training.

        Args:
            input_ids: (B, U+1) token ids: the blank, followed by the labels.

        Returns:
            (B, U+1, J) predictor states.
        """
        hidden, _ = self.lstm(self.embedding(input_ids))
        return self.decoder_projector(F.dropout(hidden, self.dropout, self.training))

    def step(self, labels: Tensor, lstm_state: LstmState | None) -> tuple[Tensor, LstmState]:
        """Advance the prediction network by one label, for decoding.

        An unmodified `nn.LSTM` (not quantised or wrapped) is computed layer by layer from its weights, because
        `nn.LSTM` copies its weights to a packed layout in every call. With `uses_int8`, the products use rounded copies
        of the weights.

        Args:
            labels: (B,) last label of each hypothesis; the blank for an empty hypothesis.
            lstm_state: hidden and cell states before the step, each (num_layers, B, width of the prediction network);
                `None` for empty hypotheses.

        Returns:
            (B, J) predictor states, and the hidden and cell states after the step; with `uses_int8`, those of an
            unmodified LSTM are in float32.
        """
        embeddings = self.embedding(labels)
        if not is_unmodified(self.lstm, nn.LSTM):
            # sequences of length 1
            output, lstm_state = self.lstm(embeddings[:, None], lstm_state)
            return self.decoder_projector(output[:, 0]), lstm_state
        if lstm_state is None:
            zeros = embeddings.new_zeros(self.lstm.num_layers, *embeddings.shape)
            lstm_state = (zeros, zeros)
        compute_gates = prepare_int8_lstm(self.lstm).compute_gates if self.uses_int8 else self._compute_gates
        new_hidden, new_cells, layer_input = [], [], embeddings
        for layer_index in range(self.lstm.num_layers):
            gates = compute_gates(layer_index, layer_input, lstm_state[0][layer_index])
            hidden, cells = update_lstm_layer(gates, lstm_state[1][layer_index])
            new_hidden.append(hidden)
            new_cells.append(cells)
            # the hidden states are the input of the next layer
            layer_input = hidden
        predictor_states = self.decoder_projector(layer_input.to(embeddings.dtype))
        return predictor_states, (torch.stack(new_hidden), torch.stack(new_cells))

    def _compute_gates(self, layer_index: int, layer_input: Tensor, hidden: Tensor) -> Tensor:
        """Compute the gates of one layer of `self.lstm`, before their activations.

        Args:
            layer_index: index of the LSTM layer.
            layer_input: (B, P) embeddings of the labels, or hidden states of the previous layer; P is the width of the
                prediction network.
            hidden: (B, P) hidden states of this layer before the step.

        Returns:
            (B, 4 * P) gates in PyTorch's order.
        """
        weight_ih, weight_hh, bias_ih, bias_hh = (
            getattr(self.lstm, f"{name}_l{layer_index}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates = small_batch_linear(layer_input, weight_ih, bias_ih + bias_hh)
        return gates + small_batch_linear(hidden, weight_hh)


def update_lstm_layer(gates: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the states of an LSTM layer after a step, with the equations in the documentation of `nn.LSTM`.

    Args:
        gates: (B, 4 * P) gates in PyTorch's order, before their activations; P is the width of the LSTM.
        cells: (B, P) cell states before the step.

    Returns:
        (B, P) hidden states and (B, P) cell states after the step.
    """
    input_gate, forget_gate, candidate, output_gate = gates.chunk(4, dim=1)
    cells = torch.addcmul(forget_gate.sigmoid() * cells, input_gate.sigmoid(), candidate.tanh())
    return output_gate.sigmoid() * cells.tanh(), cells


class ParakeetRNNTJointNetwork(nn.Module):
    """Joint network: sum of encoder state and predictor state, activation, and a linear output layer.

    Args:
        config: configuration of the transducer. It gives the joint width J, the activation, the dropout probability and
            the vocabulary size V.
        num_outputs: number of outputs: V for RNN-T, V + D for TDT; `None` for V.
    """

    def __init__(self, config: ParakeetRNNTConfig, num_outputs: int | None = None) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = config.joint_dropout
        self.head = nn.Linear(config.joint_hidden_size or config.decoder_hidden_size, num_outputs or config.vocab_size)

    def forward(self, decoder_hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Compute the logits of all tokens, and for TDT of all durations.

        Args:
            decoder_hidden_states: (..., J) predictor states.
            encoder_hidden_states: (..., J) encoder states, projected to the joint width. Their shape must broadcast
                with the shape of `decoder_hidden_states`.

        Returns:
            (..., V) logits for RNN-T, (..., V + D) logits for TDT.
        """
        hidden = self._combine(encoder_hidden_states, decoder_hidden_states)
        return self.head(F.dropout(hidden, self.dropout, self.training))

    def _combine(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Add (..., J) encoder states and (..., J) predictor states, with broadcasting, and apply the activation."""
        return self.activation(encoder_states + predictor_states)

    def get_output_weights(self, example: Tensor) -> tuple[Tensor, Tensor]:
        """Get the weight and bias of the output layer for the fused loss.

        Gradients with respect to the result pass on to the parameters of the output layer, also if the layer is wrapped
        by an adapter such as LoRA.

        Args:
            example: tensor with the dtype and device of the input of the output layer; its values are not used.

        Returns:
            Weight and bias: (V, J) and (V,) for RNN-T, (V + D, J) and (V + D,) for TDT.
        """
        if is_unmodified(self.head, nn.Linear):
            return self.head.weight, self.head.bias
        return probe_affine_layer(self.head, self.head.in_features, example)

    def score(self, encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
        """Compute the logits for several frames of each hypothesis in decoding, without dropout.

        Args:
            encoder_states: (R, num_frames, J) projected encoder states of some frames for each of R hypotheses.
            predictor_states: (R, 1, J) predictor state of each hypothesis.

        Returns:
            (R, num_frames, V) logits for RNN-T, (R, num_frames, V + D) logits for TDT.
        """
        if not is_unmodified(self.head, nn.Linear):
            return self(predictor_states, encoder_states)
        hidden = self._combine(encoder_states, predictor_states)
        logits = small_batch_linear(hidden.flatten(0, 1), self.head.weight, self.head.bias)
        return logits.unflatten(0, hidden.shape[:2])

    def build_argmax_functions(
        self, vocab_size: int
    ) -> tuple[ArgmaxFunction | None, ArgmaxFunction | None, SearchFunction | None]:
        """Build functions that find the best tokens and durations faster than `score` computes all logits.

        Args:
            vocab_size: number of tokens V with the blank; the outputs from index V on are durations.

        Returns:
            A function that finds the best durations (`None` for RNN-T), a function that finds the best tokens, and a
            function that decides where the blank is the best token and returns rough scores. The last two are `None`
            on a device without fast int8 products. All are `None` if the output layer is wrapped, for example by LoRA.
            The functions take encoder states (R, num_frames, J) and predictor states (R, 1, J) of R hypotheses. The
            first two return (R, num_frames) indices.
        """
        if not is_unmodified(self.head, nn.Linear):
            return None, None, None
        weight, bias = self.head.weight, self.head.bias

        @cache
        def get_search() -> Int8Search:
            """Prepare the search on first use; decoding with confidence never searches."""
            return prepare_search(self.head, vocab_size)

        def find_best_durations(encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
            """Return the (R, num_frames) indices of the best durations."""
            hidden = self._combine(encoder_states, predictor_states)
            return F.linear(hidden, weight[vocab_size:], bias[vocab_size:]).argmax(-1)

        def find_best_tokens(encoder_states: Tensor, predictor_states: Tensor) -> Tensor:
            """Return the (R, num_frames) ids of the best tokens."""
            hidden = self._combine(encoder_states, predictor_states)
            best_tokens = get_search().argmax(hidden.flatten(0, 1), weight[:vocab_size], bias[:vocab_size])
            return best_tokens.unflatten(0, hidden.shape[:2])

        def search_tokens(encoder_states: Tensor, predictor_states: Tensor) -> SearchedOutputs | None:
            """Decide where the blank is the best token, with rough scores; `None` if these scores do not suffice."""
            rows = self._combine(encoder_states, predictor_states).flatten(0, 1)
            return get_search().search(rows, weight[:vocab_size], bias[:vocab_size])

        find_durations = find_best_durations if len(weight) > vocab_size else None
        if not Int8Search.is_faster(weight):
            return find_durations, None, None
        return find_durations, find_best_tokens, search_tokens

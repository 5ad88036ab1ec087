"""The two networks of a transducer beside the encoder: prediction network and joint.

They only compute; the loop that feeds a token back is in `decoding.py`.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ..configuration_parakeet import ParakeetRNNTConfig
from .fast_linear import ScreenedLinear
from .plain_modules import is_plain

# hidden and cell state of every LSTM layer, each (layers, B, P)
LSTMState = tuple[Tensor, Tensor]

# length of the vectors that read a wrapped output layer: in 16-bit types the bias must not swamp the weight, and a
# power of two loses no digits
PROBE = 256.0


class ParakeetRNNTDecoder(nn.Module):
    """Prediction network: embedding, LSTM and projection to the joint's width (Graves, arXiv 1211.3711, section 2)."""

    def __init__(self, config: ParakeetRNNTConfig) -> None:
        super().__init__()
        width = config.decoder_hidden_size
        self.dropout = config.decoder_dropout
        self.embedding = nn.Embedding(config.vocab_size, width)
        between = config.decoder_dropout if config.num_decoder_layers > 1 else 0.0
        self.lstm = nn.LSTM(width, width, config.num_decoder_layers, batch_first=True, dropout=between)
        self.decoder_projector = nn.Linear(width, config.joint_hidden_size or width)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Run over whole sequences.

        Args:
            input_ids: (B, U+1) the blank, then the labels.

        Returns:
            (B, U+1, J) predictor states.
        """
        hidden, _ = self.lstm(self.embedding(input_ids))
        return self.decoder_projector(F.dropout(hidden, self.dropout, self.training))

    def step(self, tokens: Tensor, state: LSTMState | None) -> tuple[Tensor, LSTMState]:
        """Run one step.

        Args:
            tokens: (B,) the last label of each row, or the blank at the start.
            state: LSTM state before the step; `None` at the start.

        Returns:
            (B, J) predictor state and the LSTM state after the step.
        """
        hidden = self.embedding(tokens)
        if not is_plain(self.lstm, nn.LSTM):
            output, state = self.lstm(hidden[:, None], state)
            return self.decoder_projector(output[:, 0]), state
        if state is None:
            zeros = hidden.new_zeros(self.lstm.num_layers, len(tokens), hidden.shape[1])
            state = (zeros, zeros)
        hiddens, cells = [], []
        for layer in range(self.lstm.num_layers):
            hidden, cell = self._cell(layer, hidden, state[0][layer], state[1][layer])
            hiddens.append(hidden)
            cells.append(cell)
        return self.decoder_projector(hidden), (torch.stack(hiddens), torch.stack(cells))

    def _cell(self, layer: int, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """One LSTM cell; nn.LSTM itself repacks its weights on every call."""
        w_ih, w_hh, b_ih, b_hh = (
            getattr(self.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        gates = add_gates(add_gates((b_ih + b_hh).view(4, 1, -1), inputs, w_ih), hidden, w_hh)
        # in torch's order: into, forget, new, out
        opened, new, out = gates[:2].sigmoid(), gates[2].tanh(), gates[3].sigmoid()
        cell = torch.addcmul(opened[0] * new, opened[1], cell)
        return out * cell.tanh(), cell


def add_gates(gates: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """Add the products of few rows with the weights of the four gates, as a batch of four products.

    On a CPU the products are bound by reading the weights, and a matrix library reads them at very different speeds:
    for four weights of (2560, 640) and 1, 4, 12 rows `F.linear` takes 2.3, 2.8, 3.2 ms, this 0.6, 1.0, 1.9 ms (torch
    2.13, two cores, weights not in the cache).

    Args:
        gates: what is added to, (4, R, P) or (4, 1, P).
        hidden: (R, P).
        weight: (4P, P).

    Returns:
        (4, R, P).
    """
    weights = weight.view(4, -1, hidden.shape[1])
    if weight.device.type == "cpu" and len(hidden) <= 4:
        products = torch.bmm(weights, hidden.contiguous().t().expand(4, -1, -1))
        return products.transpose(1, 2).contiguous().add_(gates)
    return torch.baddbmm(gates, hidden.expand(4, -1, -1), weights.transpose(1, 2))


def few_rows_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `hidden @ weight.T + bias` for few rows and a large weight.

    On a CPU in float32 the matrix library reads the weight best as the left factor, with rows that are neighbours in
    memory, and two of them: for 1, 4, 16 rows and an (8198, 640) weight 0.6, 0.8, 2.2 ms instead of 1.8, 2.9, 3.5 ms
    (torch 2.13, two cores, weight not in the cache).

    Args:
        hidden: (R, in).
        weight: (out, in).
        bias: (out,).

    Returns:
        (R, out); a transposed view where the weight was the left factor.
    """
    if weight.device.type == "cpu" and weight.dtype == torch.float32 and len(hidden) <= 64:
        rows = hidden.repeat(2, 1) if len(hidden) == 1 else hidden.contiguous()
        return torch.mm(weight, rows.t()).t()[: len(hidden)].add_(bias)
    return F.linear(hidden, weight, bias)


class ParakeetRNNTJointNetwork(nn.Module):
    """Joint network: activation of the sum of a frame and a predictor state, and the output layer."""

    def __init__(self, config: ParakeetRNNTConfig, outputs: int | None = None) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = config.joint_dropout
        self.head = nn.Linear(config.joint_hidden_size or config.decoder_hidden_size, outputs or config.vocab_size)

    def forward(self, decoder_hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        """Score tokens (and durations).

        Args:
            decoder_hidden_states: (..., J) predictor states.
            encoder_hidden_states: (..., J) projected frames; both broadcast.

        Returns:
            (..., V) or (..., V + D) raw scores.
        """
        hidden = self._combined(encoder_hidden_states, decoder_hidden_states)
        return self.head(F.dropout(hidden, self.dropout, self.training))

    def _combined(self, encoder_hidden_states: Tensor, decoder_hidden_states: Tensor) -> Tensor:
        """Return what the output layer reads."""
        return self.activation(encoder_hidden_states + decoder_hidden_states)

    def output_layer(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight (V [+ D], J) and bias (V [+ D],) of the output layer, through which gradients reach it.

        What stands around the layer (LoRA, a quantised weight, a hook that brings it from elsewhere) is affine, too:
        its weight is read off its answers to the unit vectors. Dropout on LoRA's input then drops the same inputs in
        all cells.

        Args:
            like: an input of the joint network, for its type and device.
        """
        if is_plain(self.head, nn.Linear):
            return self.head.weight, self.head.bias
        units = PROBE * torch.eye(self.head.in_features, dtype=like.dtype, device=like.device)
        bias = self.head(torch.zeros_like(units[:1]))[0]
        return ((self.head(units) - bias) / PROBE).t(), bias

    def score(self, encoder_hidden_states: Tensor, decoder_hidden_states: Tensor) -> Tensor:
        """Score (R, K, J) frames with (R, 1, J) predictor states in decoding; returns (R, K, V [+ D])."""
        if not is_plain(self.head, nn.Linear):
            return self(decoder_hidden_states, encoder_hidden_states)
        hidden = self._combined(encoder_hidden_states, decoder_hidden_states)
        scores = few_rows_linear(hidden.flatten(0, 1), self.head.weight, self.head.bias)
        return scores.unflatten(0, hidden.shape[:2])

    def shortcuts(self, vocab_size: int) -> tuple[Callable[..., Tensor] | None, Callable[..., Tensor] | None]:
        """Return the ways to best outputs that are faster than all scores.

        Args:
            vocab_size: tokens V; outputs behind them are durations.
        """
        if not is_plain(self.head, nn.Linear):
            return None, None
        weight, bias = self.head.weight, self.head.bias

        @cache
        def screened() -> ScreenedLinear:
            # made when it is first asked for: not where scores are wanted
            return ScreenedLinear(weight[:vocab_size], bias[:vocab_size])

        def durations(encoder_hidden_states: Tensor, decoder_hidden_states: Tensor) -> Tensor:
            hidden = self._combined(encoder_hidden_states, decoder_hidden_states)
            return F.linear(hidden, weight[vocab_size:], bias[vocab_size:]).argmax(-1)

        def tokens(encoder_hidden_states: Tensor, decoder_hidden_states: Tensor) -> Tensor:
            hidden = self._combined(encoder_hidden_states, decoder_hidden_states)
            return screened().argmax(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])

        return durations if len(weight) > vocab_size else None, tokens if ScreenedLinear.suits(weight) else None

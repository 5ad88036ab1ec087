"""The two networks of a transducer beside the encoder: prediction network and joint.

They only compute; the loop that feeds a token back is in `decoding.py`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .configuration_parakeet import ParakeetRNNTConfig

# hidden and cell state of every LSTM layer, each (layers, B, P)
LSTMState = tuple[Tensor, Tensor]


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
        if state is None:
            zeros = hidden.new_zeros(self.lstm.num_layers, len(tokens), hidden.shape[1])
            state = (zeros, zeros)
        hiddens, cells = [], []
        for layer in range(self.lstm.num_layers):
            # the cell is called by itself: nn.LSTM repacks its weights on every call
            weights = [
                getattr(self.lstm, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            ]
            hidden, cell = torch.lstm_cell(hidden, (state[0][layer], state[1][layer]), *weights)
            hiddens.append(hidden)
            cells.append(cell)
        return self.decoder_projector(hidden), (torch.stack(hiddens), torch.stack(cells))


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
        hidden = self.activation(encoder_hidden_states + decoder_hidden_states)
        return self.head(F.dropout(hidden, self.dropout, self.training))

"""Output classes of the encoder and of the transducer models.

The models that return them are in `modeling_parakeet.py`.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling


@dataclass
class ParakeetEncoderModelOutput(BaseModelOutputWithPooling):
    """Output of the encoder.

    Args:
        last_hidden_state: (B, N, H) encoder frames.
        pooler_output: (B, N, J) encoder states, projected to the width of the joint network; `None` except for
            transducers.
        hidden_states: input of the first block and output of each block, each (B, N, H); `None` unless
            `output_hidden_states` is set.
        attentions: attention weights of each block, each (B, heads, N, N); `None` unless `output_attentions` is set.
        attention_mask: (B, N) integer mask, 1 on non-padding frames; `None` if the input had no mask.
    """

    attention_mask: Tensor | None = None


@dataclass
class ParakeetRNNTOutput(BaseModelOutputWithPooling):
    """Output of a transducer model.

    Args:
        loss: transducer loss (hybrid loss if the model has a CTC head); `None` without labels.
        logits: (B, N, U+1, V) logits of the joint network, (B, N, U+1, V + D) for TDT; `None` if labels are given and
            `output_logits` is not set.
        last_hidden_state: (B, N, H) encoder frames.
        pooler_output: (B, N, J) encoder states, projected to the width of the joint network.
        hidden_states: input of the first encoder block and output of each block, each (B, N, H); `None` unless
            `output_hidden_states` is set.
        attentions: attention weights of each encoder block, each (B, heads, N, N); `None` unless `output_attentions`
            is set.
        attention_mask: (B, N) integer mask, 1 on non-padding frames; `None` if the input had no mask.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    attention_mask: Tensor | None = None


__all__ = ["ParakeetEncoderModelOutput", "ParakeetRNNTOutput"]

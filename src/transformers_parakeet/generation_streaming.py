"""Passes tokens to the streamers and stopping criteria of transformers.

The search that produces the tokens is in `decoding/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepObserver:
    """Passes the steps of a transducer search to a streamer and to stopping criteria during the search.

    Args:
        start_tokens: (B, 1) start tokens, which are blanks.
        pad_id: token id that pads short sequences.
        criteria: stopping criteria of transformers.
        streamer: receives the tokens of the first clip; `None` for no streamer.
    """

    def __init__(self, start_tokens: Tensor, pad_id: int, criteria: list[Any], streamer: Any) -> None:
        self.start_tokens, self.pad_id, self.criteria, self.streamer = start_tokens, pad_id, criteria, streamer
        self.num_streamed = 0

    def __call__(self, clip_tokens: list[list[int]]) -> list[bool]:
        """Stream the new tokens of the first clip and evaluate the stopping criteria.

        Args:
            clip_tokens: all tokens of each clip so far.

        Returns:
            For each clip, whether to stop decoding.
        """
        if self.streamer is not None:
            for token in clip_tokens[0][self.num_streamed :]:
                self.streamer.put(torch.tensor([token]))
            self.num_streamed = len(clip_tokens[0])
        if not self.criteria:
            return [False] * len(clip_tokens)
        max_length = max(map(len, clip_tokens))
        padded_tokens = [tokens + [self.pad_id] * (max_length - len(tokens)) for tokens in clip_tokens]
        tokens_tensor = torch.tensor(padded_tokens, dtype=torch.long, device=self.start_tokens.device)
        sequences = torch.cat([self.start_tokens, tokens_tensor], dim=1)
        # the second argument of a criterion is the scores, which are not available during the search;
        # a criterion returns one value per clip, or a single value for all clips
        must_stop = [
            torch.as_tensor(criterion(sequences, None)).expand(len(clip_tokens)) for criterion in self.criteria
        ]
        return torch.stack(must_stop).any(0).tolist()


def stream_frames(sequences: Tensor, blank_id: int, streamer: Any) -> None:
    """Pass the best tokens to a streamer, one frame at a time.

    The first call passes a blank for each clip, because a streamer of transformers treats its first input as the
    prompt.

    Args:
        sequences: (B, N) best token of every frame.
        blank_id: id of the blank.
        streamer: a streamer of transformers; `None` to do nothing.
    """
    if streamer is None:
        return
    streamer.put(torch.full((len(sequences), 1), blank_id))
    for frame_tokens in sequences.as_subclass(Tensor).cpu().unbind(1):
        streamer.put(frame_tokens)
    streamer.end()

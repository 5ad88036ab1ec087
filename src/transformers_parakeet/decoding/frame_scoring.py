"""Which frames the greedy transducer search scores in one call of the joint network, and the best outputs on them.

The search, which chooses and scores the frames, is in `label_looping.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .label_scores import LabelScores, SearchedTokens
from .options import TransducerOptions

# Target number of frames, over all clips, that one call of the joint network scores. On a CPU a call is
# memory-bandwidth-bound on the weights, so up to this number of frames it takes little longer than for one frame.
FRAMES_PER_CALL = 32
# Maximum number of frames per clip that one call scores. The next label is rarely further ahead.
MAX_FRAMES_PER_CLIP = 4


@dataclass(frozen=True)
class Shortcuts:
    """Functions that find the best outputs of a joint network faster than by scoring all outputs.

    All take encoder states (R, K, J) of K frames of R clips and predictor states (R, 1, J). The first two return (R, K)
    indices.

    Args:
        find_best_durations: returns the index of the best duration output. With it, the search predicts which frames a
            clip visits while it emits blanks, and scores only these. `None` for RNN-T or if it is not available.
        find_best_tokens: returns the best token. It is used if no scores are needed. `None` if it is not available.
        search_tokens: decides on R * K frames whether the blank is the best token, and returns rough scores, or `None`
            if the joint network must compute all scores. It replaces `find_best_tokens` if a fusion chooses the labels.
            `None` if it is not available.
    """

    find_best_durations: Callable[[Tensor, Tensor], Tensor] | None = None
    find_best_tokens: Callable[[Tensor, Tensor], Tensor] | None = None
    search_tokens: Callable[[Tensor, Tensor], SearchedTokens | None] | None = None


@dataclass(frozen=True)
class FramePlan:
    """The frames that one call of the joint network scores: K frames of each of R clips.

    Args:
        clip_indices: indices of the R clips.
        frames: K frame indices of each clip, in chronological order.
        predictor_states: (R, 1, J) predictor states of the clips.
        durations: predicted duration of each frame, if the shortcut for durations was used; `None` otherwise.
    """

    clip_indices: list[int]
    frames: list[list[int]]
    predictor_states: Tensor
    durations: list[list[int]] | None = None


@dataclass(frozen=True)
class FrameScores:
    """The best outputs of the joint network on the frames of a `FramePlan`: K frames of each of R clips.

    Args:
        tokens: best token of each frame; if `searched_tokens` is set, the blank or any label.
        durations: predicted duration of each frame; for RNN-T 1 for a blank and 0 for a label.
        logits: (R, K, V + D) scores; `None` if a shortcut for tokens was used.
        searched_tokens: the result of the shortcut for a fusion; `None` if it was not used.
    """

    tokens: list[list[int]]
    durations: list[list[int]]
    logits: Tensor | None
    searched_tokens: SearchedTokens | None = None


@dataclass(frozen=True)
class NewLabels:
    """The labels of several clips since the last call of the prediction network.

    Args:
        needs_logits: whether a fusion or confidence needs the scores on the frames of the labels; otherwise the lists
            stay empty.
        clip_indices: index of the clip of each label with logits.
        logits: for each call of the joint network, the (number of labels, V) scores of all tokens on the frames of its
            labels.
        rough_clip_indices: index of the clip of each label with rough scores.
        rough_scores: for each call that returned rough scores, the scores on the frames of its labels.
    """

    needs_logits: bool
    clip_indices: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    rough_clip_indices: list[int] = field(default_factory=list)
    rough_scores: list[LabelScores] = field(default_factory=list)


def follow_blanks(durations: Sequence[int], num_offsets: int) -> list[int]:
    """List the frame offsets that the decoder visits while it emits only blanks.

    A blank advances by its predicted duration, but by at least one frame: durations 2 1 0 1 and `num_offsets` 3 give
    the offsets 0, 2, 3.

    Args:
        durations: predicted duration for each consecutive frame; must cover all returned offsets except the last one.
        num_offsets: number of offsets to return; the first one is 0.
    """
    offsets = [0]
    for _ in range(num_offsets - 1):
        current_offset = offsets[-1]
        offsets.append(current_offset + max(1, durations[current_offset]))
    return offsets


def choose_lookahead(options: TransducerOptions, num_clips: int) -> int:
    """Choose how many frames of each clip one call of the joint network scores.

    Args:
        options: settings of the search; a `lookahead` other than 0 is returned unchanged.
        num_clips: number of clips in the call.
    """
    return options.lookahead or min(MAX_FRAMES_PER_CLIP, max(1, FRAMES_PER_CALL // num_clips))

"""Compare the word errors of windows with those of whole recordings, adding one measure per row.

The recordings are strings of spoken digits from held-out splits of fsdd, ten minutes each, and the model is the bundled
demo model. Every row repeats the row above it with one more measure; the last rows use other lengths of window and
context with all measures. `examples/digit_strings.py` creates the strings.
"""

import argparse
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from digit_strings import SAMPLE_RATE, DigitString, create_evaluation_strings, read_digit_recordings

from transformers_parakeet import demo_model_path, load_nemo
from transformers_parakeet.audio import AudioSource
from transformers_parakeet.decoding import Hypotheses, collapse_ctc, greedy_decode_ctc
from transformers_parakeet.long_audio import Window, WindowOptions, merge_recording
from transformers_parakeet.long_audio.inputs import get_window_options, iterate_windows
from transformers_parakeet.long_audio.windows import merge_windows
from transformers_parakeet.processing_parakeet import to_emitted_tokens

HEADS = {"ctc": "ctc", "transducer": "tdt"}
# mean length in seconds of the pauses that `join_clips` inserts
MEAN_PAUSE_S = 0.21
# an error within this number of seconds of a cut counts as an error at a seam
SEAM_S = 1.0
# largest difference in seconds between the times of a word in windows and in the whole recording
MAX_TIME_DIFFERENCE_S = 0.1
BATCH_SIZE = 16
# lengths of window and context in seconds of the last rows
OTHER_LENGTHS = ((30.0, 7.5), (30.0, 10.0), (60.0, 10.0))


@dataclass(frozen=True)
class Row:
    """One way to recognise the recordings.

    Args:
        name: description.
        options: lengths of windows and of their search ranges; `None` for whole recordings.
        normalize_over: `"recording"` or `"chunk"`.
        moves_seams: whether tokens are divided at the longest stretch without tokens near a cut.
    """

    name: str
    options: WindowOptions | None
    normalize_over: str = "recording"
    moves_seams: bool = False


@dataclass(frozen=True)
class Recognised:
    """The result of one head for one recording.

    Args:
        words: the words.
        times: (number of words, 2) start and end of each word in seconds.
        cuts: positions of the cuts in seconds.
    """

    words: list[str]
    times: np.ndarray
    cuts: np.ndarray


def build_rows(options: WindowOptions) -> list[Row]:
    """Return the rows of the table: whole recordings, and windows with one more measure per row."""
    fixed = replace(options, cut_search=0, left_search=0, right_search=0)
    return [
        Row("whole recordings", None),
        Row("fixed cuts, statistics of the window", fixed, "chunk"),
        Row("+ statistics of the recording", fixed),
        Row("+ cuts in pauses", replace(options, left_search=0, right_search=0)),
        Row("+ edges of the context in pauses", options),
        Row("+ tokens divided near the cut", options, moves_seams=True),
    ]


def create_strings(data: Path, number: int, minutes: float) -> list[DigitString]:
    """Create long strings of digits: one half from the dev split of fsdd, and one half from the test split.

    Args:
        data: folder with packed speech.
        number: number of strings.
        minutes: approximate length of a string.
    """
    strings = []
    for seed, split in enumerate(("dev", "test"), start=1):
        clips = read_digit_recordings(data, split)
        mean_s = sum(len(clip.audio) for clip in clips) / len(clips) / SAMPLE_RATE
        num_clips = round(60 * minutes / (mean_s + MEAN_PAUSE_S))
        strings += create_evaluation_strings(clips, number // 2, seed, num_clips, num_clips)
    return strings


def recognise(model: Any, processor: Any, samples: np.ndarray, row: Row) -> dict[str, Recognised]:
    """Recognise a recording with both heads.

    Args:
        model: hybrid model.
        processor: processor of the model.
        samples: (S,) samples of the recording.
        row: how the recording is recognised.

    Returns:
        The result of each head.
    """
    extractor, frame = processor.feature_extractor, model.config.inputs_to_logits_ratio
    if row.options is None:
        inputs = extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        windows, batches = [Window(0, len(samples), 0, None)], [(inputs["input_features"], inputs["attention_mask"])]
    else:
        source, cpu = AudioSource(samples), torch.device("cpu")
        pieces = list(iterate_windows(source, row.options, row.normalize_over, extractor, model.config, cpu, None))
        windows = [piece.window for piece in pieces]
        batches = [
            pad_windows([piece.features[0, piece.mask[0]] for piece in pieces[first : first + BATCH_SIZE]])
            for first in range(0, len(pieces), BATCH_SIZE)
        ]
    results = {}
    all_hypotheses = [decode_both_heads(model, features, mask) for features, mask in batches]
    for decoder in HEADS:
        hypotheses = [batch[decoder][index] for batch in all_hypotheses for index in range(len(batch[decoder]))]
        if row.moves_seams:
            merged = merge_recording(hypotheses, windows, None, SAMPLE_RATE, frame)
        else:
            merged = merge_windows(hypotheses, windows, frame)
        head_type = HEADS[decoder]
        chunks = processor.chunks(to_emitted_tokens(merged), "word", head_type, frame / SAMPLE_RATE, (), None, "min")
        times = np.array([chunk["timestamp"] for chunk in chunks]).reshape(-1, 2)
        cuts = np.array([window.keep_from / SAMPLE_RATE for window in windows[1:]])
        results[decoder] = Recognised([chunk["text"].strip() for chunk in chunks], times, cuts)
    return results


@torch.inference_mode()
def decode_both_heads(model: Any, features: torch.Tensor, mask: torch.Tensor) -> dict[str, Hypotheses]:
    """Decode a batch greedily with the CTC head and the transducer; the encoder runs once.

    Args:
        model: hybrid model.
        features: (B, T, F) features.
        mask: (B, T) mask, True for valid frames.
    """
    encoded = model.get_audio_features(input_features=features, attention_mask=mask)
    logits, blank_id = model.ctc_logits(encoded.last_hidden_state), model.config.blank_token_id
    best_tokens = greedy_decode_ctc(logits, encoded.attention_mask.sum(-1), blank_id)
    transducer_output = model.generate(encoder_outputs=encoded, return_dict_in_generate=True)
    return {"ctc": collapse_ctc(best_tokens, blank_id), "transducer": transducer_output.hypotheses}


def pad_windows(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad the (T_i, F) features of several windows; return (B, T, F) features and a (B, T) mask."""
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(window), dtype=torch.bool) for window in features], True)
    return torch.nn.utils.rnn.pad_sequence(list(features), True), mask


def locate_errors(string: DigitString, result: Recognised) -> np.ndarray:
    """Return the times in seconds of all word errors of a result: of the reference word, or of the inserted word."""
    times = []
    for part in jiwer.process_words(string.text, " ".join(result.words)).alignments[0]:
        if part.type in ("substitute", "delete"):
            times += [string.spans[index].start_s for index in range(part.ref_start_idx, part.ref_end_idx)]
        elif part.type == "insert":
            times += [float(result.times[index, 0]) for index in range(part.hyp_start_idx, part.hyp_end_idx)]
    return np.array(times)


def count_near(times: np.ndarray, cuts: np.ndarray) -> int:
    """Count the times that are at most `SEAM_S` seconds away from a cut."""
    if len(times) == 0 or len(cuts) == 0:
        return 0
    return int((np.abs(times[:, None] - cuts).min(1) <= SEAM_S).sum())


def compare_times(result: Recognised, whole: Recognised) -> np.ndarray:
    """Return the largest difference in seconds of start and end for every word that both results contain."""
    differences = []
    for part in jiwer.process_words(" ".join(whole.words), " ".join(result.words)).alignments[0]:
        if part.type == "equal":
            ours = result.times[part.hyp_start_idx : part.hyp_end_idx]
            theirs = whole.times[part.ref_start_idx : part.ref_end_idx]
            differences.append(np.abs(ours - theirs).max(1))
    return np.concatenate(differences)


def print_row(name: str, strings: Sequence[DigitString], results: list[Any], whole: list[Any]) -> None:
    """Print the errors of one row for both heads, compared with those of the whole recordings.

    Args:
        name: name of the row.
        strings: the references.
        results: for each string the result of each head.
        whole: the results of the row of whole recordings.
    """
    cells = []
    for decoder in HEADS:
        pairs = [
            (string, one[decoder], all_[decoder]) for string, one, all_ in zip(strings, results, whole, strict=True)
        ]
        errors = [locate_errors(string, one) for string, one, _ in pairs]
        whole_errors = [locate_errors(string, all_) for string, _, all_ in pairs]
        number, whole_number = sum(map(len, errors)), sum(map(len, whole_errors))
        near = sum(count_near(times, one.cuts) for times, (_, one, _) in zip(errors, pairs, strict=True))
        whole_near = sum(count_near(times, one.cuts) for times, (_, one, _) in zip(whole_errors, pairs, strict=True))
        differences = np.concatenate([compare_times(one, all_) for _, one, all_ in pairs])
        share = (differences <= MAX_TIME_DIFFERENCE_S).mean()
        cells.append(f"{number:5} {number / max(whole_number, 1):6.3f} {near:4}/{whole_near:<4} {share:8.2%}")
    print(f"{name:38} " + "   ".join(cells), flush=True)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech, with the folder fsdd")
    parser.add_argument("--strings", type=int, default=10, help="number of strings, half dev and half test")
    parser.add_argument("--minutes", type=float, default=10, help="length of a string")
    parser.add_argument("--window", type=float, default=30, help="maximum length of a window in seconds")
    parser.add_argument("--context", type=float, default=None, help="context on each side in seconds; default: a sixth")
    options = parser.parse_args()
    model, processor = load_nemo(demo_model_path())
    strings = create_strings(options.data, options.strings, options.minutes)
    num_words = sum(len(string.spans) for string in strings)
    print(f"{len(strings)} strings, {num_words} words, windows of {options.window:g} s; torch {torch.__version__}, "
          f"{platform.machine()}, Python {platform.python_version()}")  # fmt: skip
    print("per head: errors, ratio to whole, errors within 1 s of a cut (windows/whole), words within 0.1 s of whole")
    print(f"{'':38} {'CTC':30}  {'TDT':30}")
    window_options = get_window_options(options.window, options.context, processor.feature_extractor, model.config)
    rows = build_rows(window_options)
    for window_s, context_s in OTHER_LENGTHS:
        other_options = get_window_options(window_s, context_s, processor.feature_extractor, model.config)
        rows.append(Row(f"windows of {window_s:g} s, context of {context_s:g} s", other_options, moves_seams=True))
    whole: list[Any] = []
    for row in rows:
        results = [recognise(model.eval(), processor, string.audio, row) for string in strings]
        whole = whole or results
        print_row(row.name, strings, results, whole)


if __name__ == "__main__":
    main()

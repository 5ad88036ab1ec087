"""Measures the time of beam search, n-gram models and phrase boosting relative to greedy decoding, in one run.

    python benchmarks/search.py [--rounds 5]

The transducer has a prediction network of width 640, 8193 tokens and random weights (see `decoding.py`); the scores of
the CTC head are random. A batch has 16 clips of 375 encoder frames (30 s). The n-gram model has 200,000 random n-grams
of tokens up to order 3. The phrases are 10,000 random sequences of 2 to 6 tokens. The benchmark first checks that
weights of 0 give the tokens of greedy decoding.

With a fusion the text differs, and so does the number of labels. So the benchmark also runs greedy decoding with tiny
weights that change no label: this is the cost of the fusion for equal work.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from decoding import NUM_FRAMES, VOCAB_SIZE, build_model

import transformers_parakeet
from transformers_parakeet.decoding import (
    BeamOptions,
    BoostedPhrase,
    TokenScorer,
    beam_decode_ctc,
    build_boosting_tree,
    build_fusion,
    greedy_decode_ctc,
    load_language_model,
)

BATCH_SIZE = 16
# weight of a fusion that changes no label
TINY_WEIGHT = 1e-6
NUM_BIGRAMS, NUM_TRIGRAMS, NUM_PHRASES = 100_000, 100_000, 10_000
# in NeMo's ARPA files, a token is the character with this code plus its id
TOKEN_OFFSET = 100


def write_random_arpa(path: Path) -> None:
    """Write an ARPA file with all unigrams, random bigrams, and random trigrams that extend them."""
    rng = np.random.default_rng(0)
    num_labels = VOCAB_SIZE - 1
    bigrams = np.unique(rng.integers(num_labels, size=(NUM_BIGRAMS, 2)), axis=0)
    followers: dict[int, np.ndarray] = {}
    for first in np.unique(bigrams[:, 0]):
        followers[int(first)] = bigrams[bigrams[:, 0] == first, 1]
    # the history and the suffix of a trigram are bigrams
    trigrams = {
        (int(first), int(second), int(rng.choice(followers[int(second)])))
        for first, second in bigrams[rng.integers(len(bigrams), size=NUM_TRIGRAMS)]
        if int(second) in followers
    }
    tables = [[(token,) for token in range(num_labels)], bigrams.tolist(), sorted(trigrams)]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        counts = [len(tables[0]) + 3, len(tables[1]), len(tables[2])]
        file.write("\\data\\\n" + "".join(f"ngram {order}={count}\n" for order, count in enumerate(counts, 1)))
        for order, ngrams in enumerate(tables, start=1):
            file.write(f"\n\\{order}-grams:\n")
            if order == 1:
                file.write("-99\t<s>\t-0.3\n-3.0\t</s>\n-5.0\t<unk>\n")
            for ngram in ngrams:
                text = " ".join(chr(TOKEN_OFFSET + token) for token in ngram)
                backoff = "" if order == len(tables) else f"\t{-rng.random():.4f}"
                file.write(f"{-4 * rng.random():.4f}\t{text}{backoff}\n")
        file.write("\n\\end\\\n")


def build_scorers() -> dict[str, TokenScorer]:
    """Build the random n-gram model and the random phrases."""
    rng = np.random.default_rng(1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.arpa"
        write_random_arpa(path)
        language_model = load_language_model(path, [str(token) for token in range(VOCAB_SIZE - 1)], "nemo")
    phrases = [
        BoostedPhrase(tuple(rng.integers(VOCAB_SIZE - 1, size=rng.integers(2, 7)).tolist())) for _ in range(NUM_PHRASES)
    ]
    return {"language_model": language_model, "boosting": build_boosting_tree(phrases, VOCAB_SIZE - 1)}


def build_transducer_runs(scorers: dict[str, TokenScorer]) -> dict[str, Callable[[], Any]]:
    """Return one function per way to decode with the transducer; the first is greedy decoding."""
    model, features = build_model(transformers_parakeet, BATCH_SIZE)

    def run(**arguments: Any) -> Callable[[], Any]:
        """Return a function that decodes the batch."""
        return lambda: model.generate(input_features=features, **arguments).sequences

    check_weights_of_zero(run()(), run(**scorers, lm_weight=0.0, boosting_weight=0.0)())
    check_weights_of_zero(run()(), run(**scorers, lm_weight=TINY_WEIGHT, boosting_weight=TINY_WEIGHT)())
    language_model, boosting = scorers["language_model"], scorers["boosting"]
    return {
        "greedy": run(),
        "greedy, n-gram model": run(language_model=language_model, lm_weight=0.3),
        "greedy, 10,000 phrases": run(boosting=boosting),
        "greedy, n-gram model, same labels": run(language_model=language_model, lm_weight=TINY_WEIGHT),
        "greedy, 10,000 phrases, same labels": run(boosting=boosting, boosting_weight=TINY_WEIGHT),
        "beam 2": run(num_beams=2),
        "beam 4": run(num_beams=4),
        "beam 8": run(num_beams=8),
        "beam 4, n-gram model and phrases": run(num_beams=4, **scorers, lm_weight=0.3),
    }


def build_ctc_runs(scorers: dict[str, TokenScorer]) -> dict[str, Callable[[], Any]]:
    """Return one function per way to decode with a CTC head; the first is greedy decoding."""
    generator, blank_id = torch.Generator().manual_seed(2), VOCAB_SIZE - 1
    logits = torch.randn(BATCH_SIZE, NUM_FRAMES, VOCAB_SIZE, generator=generator)
    # the blank has the highest score on two thirds of the frames
    logits[..., blank_id] += 5.0 * (torch.rand(BATCH_SIZE, NUM_FRAMES, generator=generator) < 0.67)
    lengths = torch.full((BATCH_SIZE,), NUM_FRAMES)
    fusion = build_fusion(scorers["language_model"], 0.3, scorers["boosting"], 1.0, blank_id, VOCAB_SIZE)
    language_model = build_fusion(scorers["language_model"], 0.3, None, 1.0, blank_id, VOCAB_SIZE)
    return {
        "greedy": lambda: greedy_decode_ctc(logits, lengths, blank_id),
        "greedy, n-gram model": lambda: greedy_decode_ctc(logits, lengths, blank_id, language_model),
        "beam 4": lambda: beam_decode_ctc(logits, lengths, blank_id, BeamOptions(4)),
        "beam 4, n-gram model and phrases": lambda: beam_decode_ctc(
            logits, lengths, blank_id, BeamOptions(4), fusion=fusion
        ),
    }


def check_weights_of_zero(expected: torch.Tensor, sequences: torch.Tensor) -> None:
    """Stop if weights of 0, or close to 0, do not give the tokens of greedy decoding."""
    if not torch.equal(expected, sequences):
        raise SystemExit("weights of 0, or close to 0, changed the tokens of greedy decoding")


def time_runs(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median of the seconds of each function; the rounds of all functions alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    # the first round is a warm-up
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    """Print one table for the transducer and one for CTC."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    scorers = build_scorers()
    print(f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads", file=sys.stderr)
    print("| search | seconds | relative to greedy |\n| --- | --- | --- |")
    for head, build_runs in (("TDT", build_transducer_runs), ("CTC", build_ctc_runs)):
        seconds = time_runs(build_runs(scorers), args.rounds)
        for name, value in seconds.items():
            print(f"| {head}, {name} | {value:.3f} | {value / seconds['greedy']:.2f} |", flush=True)


if __name__ == "__main__":
    main()

"""Train an n-gram language model for decoding from lines of text, and write it as an ARPA file.

The program holds all n-grams in memory. For more than a few million words use `lmplz` of KenLM, which writes the same
format: `lmplz -o 3 --discount_fallback < words.txt > words.arpa`.

    python examples/train_ngram.py sentences.txt words.arpa.gz --order 3 --units words
    python examples/train_ngram.py sentences.txt pieces.arpa.gz --order 4 --units pieces --model FOLDER
"""

import argparse
import gzip
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

Ngram = tuple[str, ...]

START, END, UNKNOWN = "<s>", "</s>", "<unk>"
# discounts for the counts 1, 2, and 3 or more if the text is too small to estimate them, as in lmplz
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
# log10 probability of <s>, which is never predicted
START_LOG_PROB = -99.0


@dataclass(frozen=True)
class NgramModel:
    """An n-gram model with back-off.

    Args:
        probabilities: for each order, the probability of the last word of each n-gram after the other words.
        backoffs: for each order, the back-off weight of the n-grams that are a history.
    """

    probabilities: list[dict[Ngram, float]]
    backoffs: list[dict[Ngram, float]]


def count_ngrams(sentences: Iterable[Sequence[str]], order: int) -> list[Counter[Ngram]]:
    """Count the n-grams of sentences for modified Kneser-Ney smoothing (Chen and Goodman 1998).

    The highest order has the number of occurrences. A lower order has the number of different words before the n-gram,
    or the number of occurrences if the n-gram starts with `<s>`, because no word is before it.

    Args:
        sentences: the words of each sentence.
        order: the highest order.

    Returns:
        The counts of the orders 1, 2, and so on.
    """
    occurrences: list[Counter[Ngram]] = [Counter() for _ in range(order)]
    for sentence in sentences:
        words = (START, *sentence, END)
        for length in range(1, order + 1):
            occurrences[length - 1].update(words[i : i + length] for i in range(len(words) - length + 1))
    counts = occurrences[-1:]
    for lower, higher in zip(occurrences[-2::-1], occurrences[:0:-1], strict=True):
        continuations = Counter(ngram[1:] for ngram in higher)
        counts.insert(0, Counter({n: lower[n] if n[0] == START else continuations[n] for n in lower}))
    # <s> is never predicted
    counts[0].pop((START,), None)
    return counts


def estimate_discounts(counts: Counter[Ngram]) -> tuple[float, float, float]:
    """Estimate the discounts of one order from the numbers of n-grams with the counts 1 to 4.

    Args:
        counts: count of each n-gram.

    Returns:
        The discounts for the counts 1, 2, and 3 or more: Y = n1 / (n1 + 2 n2) and k - (k + 1) Y n(k+1) / n(k) for
        k = 1, 2, 3 (Chen and Goodman 1998, modified Kneser-Ney smoothing). `FALLBACK_DISCOUNTS` if one of the numbers
        is 0, or if a discount is not above 0 and at most k.
    """
    frequencies = Counter(counts.values())
    numbers = [frequencies[count] for count in range(1, 5)]
    if 0 in numbers:
        return FALLBACK_DISCOUNTS
    ratio = numbers[0] / (numbers[0] + 2 * numbers[1])
    first, second, third = (k - (k + 1) * ratio * numbers[k] / numbers[k - 1] for k in (1, 2, 3))
    if not (0 < first <= 1 and 0 < second <= 2 and 0 < third <= 3):
        return FALLBACK_DISCOUNTS
    return first, second, third


def estimate_order(
    counts: Counter[Ngram], lower_probability: Callable[[Ngram], float]
) -> tuple[dict[Ngram, float], dict[Ngram, float]]:
    """Estimate the probabilities of one order by interpolated modified Kneser-Ney smoothing.

    Args:
        counts: count of each n-gram of the order.
        lower_probability: function that returns the probability of an n-gram of the order below.

    Returns:
        The probability of each n-gram, and the back-off weight of each history: the probability that the discounts
        leave for the order below.
    """
    discounts = estimate_discounts(counts)
    totals: dict[Ngram, int] = defaultdict(int)
    discounted: dict[Ngram, float] = defaultdict(float)
    for ngram, count in counts.items():
        totals[ngram[:-1]] += count
        discounted[ngram[:-1]] += discounts[min(count, 3) - 1]
    backoffs = {history: discounted[history] / total for history, total in totals.items()}
    probabilities = {
        ngram: (count - discounts[min(count, 3) - 1]) / totals[ngram[:-1]]
        + backoffs[ngram[:-1]] * lower_probability(ngram[1:])
        for ngram, count in counts.items()
    }
    return probabilities, backoffs


def train(sentences: Iterable[Sequence[str]], order: int) -> NgramModel:
    """Train an n-gram model.

    The order below the 1-grams is the uniform distribution over all words, `</s>` and `<unk>`.

    Args:
        sentences: the words of each sentence.
        order: the highest order.

    Returns:
        The model.

    Raises:
        ValueError: no sentence has a word.
    """
    counts = count_ngrams((sentence for sentence in sentences if sentence), order)
    if not counts[0]:
        raise ValueError("the text must contain at least one word, got none: pass lines of text")
    uniform = 1 / (len(counts[0]) + 1)
    unigrams, root_backoffs = estimate_order(counts[0], lambda _: uniform)
    unigrams[(UNKNOWN,)] = root_backoffs[()] * uniform
    probabilities, backoffs = [unigrams], []
    for order_counts in counts[1:]:
        order_probabilities, order_backoffs = estimate_order(order_counts, probabilities[-1].__getitem__)
        probabilities.append(order_probabilities)
        backoffs.append(order_backoffs)
    return NgramModel(probabilities, [*backoffs, {}])


def write_arpa(model: NgramModel, path: Path) -> None:
    """Write a model as an ARPA file.

    Args:
        model: the model.
        path: the file; it is compressed if its name ends in `.gz`.
    """
    log_probs = [{n: math.log10(p) for n, p in order.items()} for order in model.probabilities]
    log_probs[0][(START,)] = START_LOG_PROB
    lines = ["\\data\\", *(f"ngram {n}={len(order)}" for n, order in enumerate(log_probs, start=1))]
    for length, (order, backoffs) in enumerate(zip(log_probs, model.backoffs, strict=True), start=1):
        lines += ["", f"\\{length}-grams:"]
        for ngram, log_prob in sorted(order.items()):
            field = f"\t{math.log10(backoffs[ngram]):.7f}" if ngram in backoffs else ""
            lines.append(f"{log_prob:.7f}\t{' '.join(ngram)}{field}")
    content = "\n".join([*lines, "", "\\end\\", ""]).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


def split_lines(path: Path, split: Callable[[str], list[str]]) -> Iterable[list[str]]:
    """Yield the words or tokens of each line of a file, without `<s>`, `</s>` and `<unk>`.

    Args:
        path: UTF-8 text with one sentence per line.
        split: function that splits a line into words or tokens.
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        for line in file:
            yield [word for word in split(line.strip()) if word not in (START, END, UNKNOWN)]


def load_tokenize(model: str) -> Callable[[str], list[str]]:
    """Return a function that splits a text into the tokens of a speech model.

    Args:
        model: folder of the model, or its id on the Hub.
    """
    from transformers import AutoProcessor

    import transformers_parakeet  # noqa: F401  (registers the processor)

    tokenizer = AutoProcessor.from_pretrained(model).tokenizer
    return lambda text: tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


def main() -> None:
    """Read the options, train the model, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "text", type=Path, help="UTF-8 text, one sentence per line, in the spelling of the speech model"
    )
    parser.add_argument("arpa", type=Path, help="ARPA file to write; .gz to compress it")
    parser.add_argument("--order", type=int, default=3, help="largest number of words or tokens of an n-gram")
    parser.add_argument("--units", choices=("words", "pieces"), default="words", help="words, or tokens of --model")
    parser.add_argument("--model", help="folder of the speech model, for --units pieces")
    parser.add_argument("--unknown", type=float, help="log10 probability of unknown words; default: from the text")
    options = parser.parse_args()
    if options.order < 1:
        parser.error(f"--order must be at least 1, got {options.order}")
    if options.unknown is not None and not -99 <= options.unknown < 0:
        parser.error(f"--unknown must be at least -99 and below 0, got {options.unknown}")
    if options.units == "pieces" and options.model is None:
        parser.error("--units pieces needs the folder of the speech model: add --model FOLDER")
    split = load_tokenize(options.model) if options.units == "pieces" else str.split
    model = train(split_lines(options.text, split), options.order)
    if options.unknown is not None:
        model.probabilities[0][(UNKNOWN,)] = 10**options.unknown
    write_arpa(model, options.arpa)
    counts = ", ".join(f"{len(order)} {n}-grams" for n, order in enumerate(model.probabilities, start=1))
    print(f"{options.arpa}: {counts}")


if __name__ == "__main__":
    main()

"""Random ARPA files, and plain Python that scores tokens and words with them by the rules of back-off."""

import math
from itertools import product
from pathlib import Path


def write_arpa(path, orders):
    """Write an ARPA file from one dict {words: (log10 probability, log10 back-off or None)} per order."""
    lines = ["\\data\\", *(f"ngram {n}={len(order)}" for n, order in enumerate(orders, start=1))]
    for n, order in enumerate(orders, start=1):
        lines += ["", f"\\{n}-grams:"]
        for words, (log_prob, backoff) in order.items():
            lines.append(f"{log_prob:.6f}\t{' '.join(words)}" + ("" if backoff is None else f"\t{backoff:.6f}"))
    Path(path).write_text("\n".join([*lines, "", "\\end\\", ""]), encoding="utf-8", newline="\n")
    return path


def draw_orders(rng, words, order, unknown_in_ngrams=True):
    """Draw an n-gram model with random numbers in which every n-gram has its prefix and its suffix.

    Models over tokens have no n-grams with <unk>, because no token is <unk>.
    """

    def draw_values(n):
        has_backoff = n < order and rng.random() < 0.8
        # back-off weights can be above 1
        return round(-3 * rng.random(), 6), round(rng.uniform(-2, 0.5), 6) if has_backoff else None

    orders = [{(word,): draw_values(1) for word in ["<s>", "</s>", "<unk>", *words]}]
    for n in range(2, order + 1):
        ngrams = {}
        for ngram in product([word for (word,) in orders[0]], repeat=n):
            is_possible = "<s>" not in ngram[1:] and "</s>" not in ngram[:-1]
            is_possible = is_possible and (unknown_in_ngrams or "<unk>" not in ngram)
            is_closed = ngram[:-1] in orders[-1] and ngram[1:] in orders[-1]
            if is_possible and is_closed and rng.random() < 0.5:
                ngrams[ngram] = draw_values(n)
        orders.append(ngrams)
    # the n-grams of a file are in any order
    return [dict(rng.sample(list(ngrams.items()), len(ngrams))) for ngrams in orders]


def score_word(orders, history, word):
    """Return the natural log-probability of a word after all words before it, by the definition of back-off."""
    history = tuple(history)[-(len(orders) - 1) :] if len(orders) > 1 else ()
    ngram = (*history, word)
    if ngram in orders[len(ngram) - 1]:
        return orders[len(ngram) - 1][ngram][0] * math.log(10)
    backoff = orders[len(history) - 1].get(history, (0, None))[1] or 0
    return backoff * math.log(10) + score_word(orders, history[1:], word)

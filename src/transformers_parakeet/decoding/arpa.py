"""Reads n-gram language models in the ARPA format, plain or compressed with gzip, into arrays.

`ngram.py` builds token scorers from the arrays.
"""

from __future__ import annotations

import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
# fields of several n-grams: the log-probabilities, the first to the last words, the back-off weights
Columns = list[list[bytes]]

GZIP_MAGIC = b"\x1f\x8b"
# longest line in bytes; the n-grams of real models are far shorter
MAX_LINE_BYTES = 65536
# bytes that are decompressed at once
GZIP_BUFFER_BYTES = 1 << 20
# number of n-grams that are converted to arrays at once, which limits the memory for Python objects
NGRAMS_PER_CHUNK = 32768
COUNT_PATTERN = re.compile(rb"ngram\s+(\d{1,4})\s*=\s*(\d{1,18})")
# the n-grams of real models are far shorter
MAX_ORDER = 100
END_MARKER = b"\\end\\"


@dataclass(frozen=True)
class NgramOrder:
    """The n-grams of one order, sorted by their key.

    M is the number of n-grams, and W the number of words of the model.

    Args:
        keys: (M,) int64, ascending. The key of a 1-gram is its word id. The key of a longer n-gram is `prefix * W +
            word id`: the index of the n-gram without its last word in the order below, and the id of the last word.
        log_probs: (M,) float32 natural logarithm of the probability.
        backoffs: (M,) float32 natural logarithm of the back-off weight; (0,) in the highest order, which has none.
        suffixes: (M,) int32 index of the n-gram without its first word in the order below; 0 for 1-grams.
    """

    keys: Array
    log_probs: Array
    backoffs: Array
    suffixes: Array


@dataclass(frozen=True)
class ArpaModel:
    """The n-grams of an ARPA file.

    Args:
        labels: (W,) label of each word id, ascending.
        orders: the n-grams of each order; `orders[0]` contains the 1-grams.
    """

    labels: Array
    orders: tuple[NgramOrder, ...]


def read_arpa_words(path: str | Path) -> list[str]:
    """Read the words of an ARPA file.

    Args:
        path: ARPA file, plain or compressed with gzip.

    Returns:
        The words of the 1-grams in the order of the file, with `<s>`, `</s>` and `<unk>`.

    Raises:
        ValueError: the file is not an ARPA file, or is damaged before the end of the 1-grams.
    """
    with open_lines(path) as lines:
        num_unigrams = read_counts(lines)[0]
        words = [word for columns in read_section(lines, 1, num_unigrams) for word in columns[1]]
        try:
            decoded_words = [word.decode() for word in words]
        except UnicodeDecodeError as error:
            raise ValueError(f"the words must be UTF-8 text: {error}; save the file as UTF-8") from error
    missing_words = {"<s>", "</s>", "<unk>"}.difference(decoded_words)
    if missing_words:
        raise ValueError(
            f"the 1-grams of a language model must contain <s>, </s> and <unk>; {', '.join(sorted(missing_words))} is "
            f"missing in {path}: add it, or train the model with lmplz"
        )
    return decoded_words


def read_arpa(path: str | Path, word_labels: Array) -> ArpaModel:
    """Read an ARPA file to arrays. The words are sorted by labels that the caller chooses.

    The file is read in chunks, so the memory grows with the n-grams in the file and not with the counts in its header.

    Args:
        path: ARPA file, plain or compressed with gzip.
        word_labels: (W,) a different label for each word of `read_arpa_words`.

    Returns:
        The n-grams with natural logarithms.

    Raises:
        ValueError: the file is not an ARPA file or is damaged: a wrong header, other numbers of n-grams than the header
            states, a probability above 1, a number that is not finite, or an n-gram without its prefix or suffix.
    """
    with open_lines(path) as lines:
        counts = read_counts(lines)
        unigrams, word_ids = read_unigrams(lines, counts[0], word_labels, is_highest=len(counts) == 1)
        orders = [unigrams]
        for order, count in enumerate(counts[1:], start=2):
            orders.append(read_order(lines, order, count, word_ids, orders, is_highest=order == len(counts)))
        if next(lines, None) != END_MARKER:
            raise ValueError(f"the file must end with \\end\\ after {counts[-1]} {len(counts)}-grams: save it again")
    return ArpaModel(np.sort(word_labels), tuple(orders))


@contextmanager
def open_lines(path: str | Path) -> Iterator[Iterator[bytes]]:
    """Open an ARPA file, and add its path to the errors that its content causes.

    Args:
        path: ARPA file, plain or compressed with gzip, which its first two bytes show.

    Yields:
        The lines that are not empty.

    Raises:
        ValueError: the code in the `with` block raised a `ValueError`, or the compressed data are damaged.
    """
    with open(path, "rb") as file:
        is_gzip = file.peek(2)[:2] == GZIP_MAGIC
        # `GzipFile` reads single lines slowly; mypy does not know that it is a raw stream
        lines = io.BufferedReader(cast(Any, gzip.GzipFile(fileobj=file)), GZIP_BUFFER_BYTES) if is_gzip else file
        try:
            yield iterate_lines(cast(BinaryIO, lines))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"a gzip file must be complete, {path} is damaged ({error}): copy it again") from error
        except ValueError as error:
            raise ValueError(f"{path} is not a valid ARPA file: {error}") from error


def iterate_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of a file that are not empty, without the line end.

    Only a newline ends a line, because other characters that Python's text files treat as line ends are tokens.

    Args:
        file: file that was opened in binary mode.

    Raises:
        ValueError: a line is longer than `MAX_LINE_BYTES`.
    """
    while line := file.readline(MAX_LINE_BYTES):
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(
                f"a line must be shorter than {MAX_LINE_BYTES} bytes, got one that starts with {line[:60]!r}"
            )
        if line := line.strip(b" \t\r\n"):
            yield line


def read_counts(lines: Iterator[bytes]) -> list[int]:
    """Read the header, from `\\data\\` to the marker of the 1-grams.

    Args:
        lines: the lines of the file.

    Returns:
        The number of n-grams of each order.

    Raises:
        ValueError: the header is missing, or does not state the numbers of the orders 1, 2, and so on.
    """
    first_line = next(lines, b"")
    if first_line != b"\\data\\":
        raise ValueError(
            f"the first line must be \\data\\, got {first_line[:60]!r}: pass an ARPA file, not a binary model"
        )
    counts: list[int] = []
    for line in lines:
        if line == b"\\1-grams:" and counts:
            return counts
        match = COUNT_PATTERN.fullmatch(line)
        if match is None or int(match[1]) != len(counts) + 1 or len(counts) == MAX_ORDER:
            raise ValueError(
                f"the header must have a line 'ngram {len(counts) + 1}=COUNT' or the line '\\1-grams:', "
                f"got {line[:60]!r}: correct the header"
            )
        counts.append(int(match[2]))
    raise ValueError("the header must be followed by the line '\\1-grams:', but the file ends: copy it again")


def read_section(lines: Iterator[bytes], order: int, count: int) -> Iterator[Columns]:
    """Yield the n-grams of one order in chunks.

    Args:
        lines: the lines of the file after the marker of the section.
        order: number of words of each n-gram.
        count: number of n-grams that the header states.

    Yields:
        `order + 2` columns. A missing back-off weight is 0.

    Raises:
        ValueError: the section has fewer n-grams, or a line does not have the fields of an n-gram.
    """
    num_missing = count
    while num_missing:
        # one flat list, because many lists would make Python's garbage collection slow
        all_fields: list[bytes] = []
        for line in islice(lines, min(num_missing, NGRAMS_PER_CHUNK)):
            # bytes are split at ASCII whitespace only, because other whitespace characters are tokens
            fields = line.split()
            if len(fields) == order + 1:
                fields.append(b"0")
            elif line[:1] == b"\\":
                break
            elif len(fields) != order + 2:
                raise ValueError(
                    f"a line of a {order}-gram must have a log-probability, {order} words, and at most one back-off "
                    f"weight, got {line[:200]!r}"
                )
            all_fields += fields
        num_ngrams = len(all_fields) // (order + 2)
        if num_ngrams < min(num_missing, NGRAMS_PER_CHUNK):
            raise ValueError(
                f"the header states {count} {order}-grams, but the file has {count - num_missing + num_ngrams}: "
                "correct the header, or copy the file again"
            )
        num_missing -= num_ngrams
        yield [all_fields[column :: order + 2] for column in range(order + 2)]


def read_unigrams(
    lines: Iterator[bytes], count: int, word_labels: Array, *, is_highest: bool
) -> tuple[NgramOrder, dict[bytes, int]]:
    """Read the 1-grams.

    Args:
        lines: the lines of the file after the marker of the 1-grams.
        count: number of 1-grams that the header states.
        word_labels: (W,) a different label for each word of the file.
        is_highest: whether the model has only 1-grams.

    Returns:
        The 1-grams, sorted by their labels, and the id of each word: its index among the sorted 1-grams.

    Raises:
        ValueError: the section is damaged, or contains a word twice.
    """
    sorted_positions = np.argsort(word_labels)
    ranks = np.empty(len(word_labels), np.int64)
    ranks[sorted_positions] = np.arange(len(word_labels))
    words: list[bytes] = []
    log_probs, backoffs = [], []
    for columns in read_section(lines, 1, count):
        words += columns[1]
        log_probs.append(parse_log_probs(columns, "1-gram"))
        backoffs.append(parse_backoffs(columns, "1-gram"))
    word_ids = dict(zip(words, ranks.tolist(), strict=True))
    if len(word_ids) < count:
        raise ValueError(f"every word must have one 1-gram, got {count} 1-grams of {len(word_ids)} words")
    unigrams = NgramOrder(
        np.arange(count),
        join_chunks(log_probs, np.float32)[sorted_positions],
        np.empty(0, np.float32) if is_highest else join_chunks(backoffs, np.float32)[sorted_positions],
        np.zeros(count, np.int32),
    )
    return unigrams, word_ids


def read_order(
    lines: Iterator[bytes],
    order: int,
    count: int,
    word_ids: dict[bytes, int],
    lower_orders: list[NgramOrder],
    *,
    is_highest: bool,
) -> NgramOrder:
    """Read the n-grams of one order with at least two words.

    Args:
        lines: the lines of the file from the marker of the section.
        order: number of words of each n-gram.
        count: number of n-grams that the header states.
        word_ids: id of each word.
        lower_orders: the n-grams of the orders below.
        is_highest: whether no order is above this one.

    Returns:
        The n-grams, sorted by their keys.

    Raises:
        ValueError: the section is damaged, or an n-gram has no prefix or suffix in the order below, or occurs twice.
    """
    marker = next(lines, b"")
    if marker != b"\\%d-grams:" % order:
        raise ValueError(
            f"the header states {len(lower_orders[-1].keys)} {order - 1}-grams, so the line '\\{order}-grams:' must "
            f"follow them, got {marker[:60]!r}: correct the header, or copy the file again"
        )
    # one list of chunks for each field of `NgramOrder`
    chunks: tuple[list[Array], ...] = ([], [], [], [])
    name = f"{order}-gram"
    for columns in read_section(lines, order, count):
        keys, suffixes = find_parents(columns, word_ids, lower_orders)
        backoffs = np.empty(0, np.float32) if is_highest else parse_backoffs(columns, name)
        for chunk_list, chunk in zip(chunks, (keys, parse_log_probs(columns, name), backoffs, suffixes), strict=True):
            chunk_list.append(chunk)
    return sort_order(chunks, name)


def sort_order(chunks: tuple[list[Array], ...], name: str) -> NgramOrder:
    """Combine the chunks of one order, and sort the n-grams by their keys.

    Args:
        chunks: lists of chunks of the keys, log-probabilities, back-off weights and suffixes; emptied, which frees
            their memory early.
        name: name of the n-grams in errors.

    Raises:
        ValueError: an n-gram occurs twice.
    """
    keys = join_chunks(chunks[0], np.int64)
    positions = np.argsort(keys).astype(np.int32)
    keys = keys[positions]
    if np.any(keys[1:] == keys[:-1]):
        raise ValueError(f"every {name} must occur once, but one occurs twice: remove the repetition")
    log_probs = join_chunks(chunks[1], np.float32)[positions]
    backoffs = join_chunks(chunks[2], np.float32)
    suffixes = join_chunks(chunks[3], np.int32)[positions]
    return NgramOrder(keys, log_probs, backoffs[positions] if len(backoffs) else backoffs, suffixes)


def join_chunks(chunks: list[Array], dtype: type) -> Array:
    """Concatenate arrays to one array of a type, and empty their list.

    Args:
        chunks: the arrays, possibly none.
        dtype: type of the result.
    """
    joined = np.concatenate([np.empty(0, dtype), *chunks])
    chunks.clear()
    return joined


def parse_numbers(fields: list[bytes], name: str) -> Array:
    """Convert decimal logarithms to natural logarithms.

    Args:
        fields: numbers as text.
        name: name of the numbers in errors.

    Returns:
        (number of fields,) float32 natural logarithms.

    Raises:
        ValueError: a field is not a finite number.
    """
    numbers = np.fromiter(map(float, fields), np.float64, len(fields))
    is_finite = np.isfinite(numbers)
    if not is_finite.all():
        raise ValueError(f"every {name} must be a finite number, got {fields[int(np.argmin(is_finite))].decode()!r}")
    return (numbers * math.log(10)).astype(np.float32)


def parse_log_probs(columns: Columns, name: str) -> Array:
    """Convert the first column of a section to natural log-probabilities.

    Args:
        columns: columns of `read_section`.
        name: name of the n-grams in errors.

    Raises:
        ValueError: a field is not a finite number, or is a probability above 1.
    """
    log_probs = parse_numbers(columns[0], f"log-probability of a {name}")
    if log_probs.max() > 0:
        raise ValueError(
            f"every log-probability must be at most 0, got {columns[0][int(log_probs.argmax())].decode()} for a "
            f"{name}: train the model again"
        )
    return log_probs


def parse_backoffs(columns: Columns, name: str) -> Array:
    """Convert the last column of a section to natural logarithms of back-off weights.

    Args:
        columns: columns of `read_section`.
        name: name of the n-grams in errors.

    Raises:
        ValueError: a field is not a finite number.
    """
    return parse_numbers(columns[-1], f"back-off weight of a {name}")


def find_parents(columns: Columns, word_ids: dict[bytes, int], lower_orders: list[NgramOrder]) -> tuple[Array, Array]:
    """Find the prefix and the suffix of n-grams in the order below.

    Args:
        columns: columns of `read_section` for at least two words.
        word_ids: id of each word.
        lower_orders: the n-grams of the orders below.

    Returns:
        (number of n-grams,) int64 keys, and int32 indices of the suffixes.

    Raises:
        ValueError: a word has no 1-gram, or a prefix or a suffix is missing.
    """
    words = columns[1:-1]
    try:
        ids = [np.fromiter(map(word_ids.__getitem__, column), np.int64, len(column)) for column in words]
    except KeyError as error:
        raise ValueError(f"every word must have a 1-gram, but {error.args[0].decode()!r} has none") from error
    prefixes, suffixes = (find_ngrams(part, len(word_ids), lower_orders) for part in (ids[:-1], ids[1:]))
    for part_name, indices in (("prefix", prefixes), ("suffix", suffixes)):
        if indices.min() < 0:
            ngram = b" ".join(column[int(indices.argmin())] for column in words).decode()
            raise ValueError(
                f"the {part_name} of every n-gram must be an n-gram, but that of {ngram!r} is missing: train the model "
                "without removing single n-grams"
            )
    return prefixes * len(word_ids) + ids[-1], suffixes.astype(np.int32)


def find_ngrams(ids: list[Array], num_words: int, orders: list[NgramOrder]) -> Array:
    """Find n-grams.

    Args:
        ids: (number of n-grams,) word ids of the first to the last word.
        num_words: number of words W.
        orders: the n-grams of each order.

    Returns:
        (number of n-grams,) int64 indices in `orders[len(ids) - 1]`; -1 for an n-gram that is missing.
    """
    indices = ids[0]
    for last_ids, order in zip(ids[1:], orders[1:], strict=False):
        keys = np.where(indices < 0, -1, indices * num_words + last_ids)
        positions = np.searchsorted(order.keys, keys).clip(max=max(0, len(order.keys) - 1))
        is_ngram = order.keys[positions] == keys if len(order.keys) else np.zeros(len(keys), bool)
        indices = np.where(is_ngram, positions, -1)
    return indices

"""Tests of reading ARPA files: their content as arrays, damaged files, and the time and memory for large files."""

import gzip
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from ngram_helpers import draw_orders, write_arpa

from transformers_parakeet.decoding import arpa
from transformers_parakeet.decoding.arpa import read_arpa, read_arpa_words

SMALL = """\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-1.0\t</s>
-99\t<s>\t-0.25
-2.0\t<unk>
-0.5\ta\t-0.75
-0.25\tb\t0.125

\\2-grams:
-0.5\tb a\t-0.5
-0.125\t<s> a
-0.75\ta b\t-1
-1.5\ta </s>

\\3-grams:
-0.3\t<s> a b
-0.2\ta b a

\\end\\
"""


def read(path):
    """Read a file with labels in the order of its words."""
    return read_arpa(path, np.arange(len(read_arpa_words(path))))


def write(tmp_path, text):
    """Write a text to a file without changing its line ends."""
    path = tmp_path / "lm.arpa"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def check_small(path):
    """Check the arrays of `SMALL` for the words in the order <s>, b, a, <unk>, </s>."""
    assert read_arpa_words(path) == ["</s>", "<s>", "<unk>", "a", "b"]
    model = read_arpa(path, np.array([40, 0, 30, 20, 10]))
    assert model.labels.tolist() == [0, 10, 20, 30, 40]
    unigrams, bigrams, trigrams = model.orders
    ln10 = np.log(10)
    np.testing.assert_allclose(unigrams.log_probs, np.array([-99, -0.25, -0.5, -2, -1]) * ln10, rtol=1e-7)
    np.testing.assert_allclose(unigrams.backoffs, np.array([-0.25, 0.125, -0.75, 0, 0]) * ln10, rtol=1e-7)
    # the 2-grams in the order of their keys: <s> a, b a, a b, a </s>
    assert bigrams.keys.tolist() == [0 * 5 + 2, 1 * 5 + 2, 2 * 5 + 1, 2 * 5 + 4]
    np.testing.assert_allclose(bigrams.log_probs, np.array([-0.125, -0.5, -0.75, -1.5]) * ln10, rtol=1e-7)
    np.testing.assert_allclose(bigrams.backoffs, np.array([0, -0.5, -1, 0]) * ln10, rtol=1e-7)
    assert bigrams.suffixes.tolist() == [2, 2, 1, 4]
    # <s> a b has the prefix 0 and the suffix 2; a b a has the prefix 2 and the suffix 1
    assert trigrams.keys.tolist() == [0 * 5 + 1, 2 * 5 + 2]
    assert trigrams.suffixes.tolist() == [2, 1]
    assert len(trigrams.backoffs) == 0


@pytest.mark.parametrize("encode", [str.encode, lambda text: gzip.compress(text.encode())])
@pytest.mark.parametrize("change", [str, lambda text: text.replace("\n", "\r\n"), lambda text: text.replace("\t", " ")])
def test_n_grams_are_read_into_sorted_arrays(tmp_path, encode, change):
    check_small(write(tmp_path, encode(change(SMALL))))


def test_chunks_do_not_change_the_arrays(tmp_path, monkeypatch):
    path = write_arpa(tmp_path / "lm.arpa", draw_orders(random.Random(0), list("abcde"), 3))
    whole = read(path)
    monkeypatch.setattr(arpa, "NGRAMS_PER_CHUNK", 7)
    for order, order_in_chunks in zip(whole.orders, read(path).orders, strict=True):
        for name in ("keys", "log_probs", "backoffs", "suffixes"):
            np.testing.assert_array_equal(getattr(order, name), getattr(order_in_chunks, name))


@pytest.mark.parametrize("character", ["\u0085", "\u00a0", "\u2028", "\u3000"])
def test_characters_that_python_takes_for_line_ends_or_spaces_are_words(tmp_path, character):
    orders = draw_orders(random.Random(1), [character, "x"], 3)
    path = write_arpa(tmp_path / "lm.arpa", orders)
    assert set(read_arpa_words(path)) == {"<s>", "</s>", "<unk>", character, "x"}
    assert [len(order.keys) for order in read(path).orders] == [len(order) for order in orders]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\\data\\\n", "", r"first line must be \\data\\, got b'ngram 1=5'"),
        (SMALL, "", r"first line must be \\data\\, got b''"),
        ("ngram 2=4\n", "", "'ngram 2=COUNT' or the line"),
        ("ngram 1=5", "ngram 1=-5", "'ngram 1=COUNT'"),
        (SMALL[SMALL.index("\n\\1-grams") :], "", "followed by the line '.1-grams:'"),
        ("ngram 1=5", "ngram 1=6", "states 6 1-grams, but the file has 5"),
        ("ngram 2=4", "ngram 2=3", "states 3 2-grams, so the line '.3-grams:' must follow them, got b'-1.5"),
        ("ngram 3=2", "ngram 3=1", r"must end with \\end\\ after 1 3-grams"),
        ("ngram 3=2", "ngram 3=999999999999999", "states 999999999999999 3-grams, but the file has 2"),
        ("\n\\end\\\n", "", r"must end with \\end\\ after 2 3-grams"),
        ("-0.3\t<s> a b", "nan\t<s> a b", "log-probability of a 3-gram must be a finite number, got 'nan'"),
        ("-0.75\ta b", "0.01\ta b", "at most 0, got 0.01 for a 2-gram"),
        ("-0.5\ta\t-0.75", "-0.5\ta\t-inf", "back-off weight of a 1-gram must be a finite number, got '-inf'"),
        ("-0.5\ta\t-0.75", "-0.5\ta\tx", "could not convert string to float"),
        ("-0.2\ta b a", "-0.2\tb a a", "the suffix of every n-gram must be an n-gram, but that of 'b a a'"),
        ("-0.2\ta b a", "-0.2\tb b a", "the prefix of every n-gram must be an n-gram, but that of 'b b a'"),
        ("-0.2\ta b a", "-0.2\ta b c", "must have a 1-gram, but 'c' has none"),
        ("-0.2\ta b a", "-0.2\ta b", "a 3-gram must have a log-probability, 3 words"),
        ("-0.2\ta b a", "-0.2\t<s> a b", "every 3-gram must occur once"),
        ("-0.25\tb\t0.125", "-0.25\ta\t0.125", "5 1-grams of 4 words"),
        ("<unk>", "unknown", "<unk> is missing in"),
        ("-0.25\tb\t", "-0.25\t" + 70000 * "b" + "\t", "shorter than 65536 bytes, got one that starts with b'-0.25"),
    ],
)
def test_damaged_files_are_refused(tmp_path, old, new, message):
    assert old in SMALL
    with pytest.raises(ValueError, match=message) as error:
        read(write(tmp_path, SMALL.replace(old, new, 1)))
    assert str(tmp_path / "lm.arpa") in str(error.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    with pytest.raises(ValueError, match="must be UTF-8"):
        read(write(tmp_path, SMALL.encode().replace(b"\tb\t", b"\t\xff\t")))


def test_damaged_gzip_files_are_refused(tmp_path):
    compressed = gzip.compress(SMALL.encode())
    for damaged in (compressed[:-20], compressed[:40] + b"\0" * 9 + compressed[49:], compressed[:4]):
        with pytest.raises(ValueError, match=r"lm.arpa is damaged"):
            read(write(tmp_path, damaged))


LOAD_LARGE_FILE = """
import re, sys, time
from transformers_parakeet.decoding import load_language_model

def read_memory(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

pieces = [chr(token + 100) for token in range(8192)]
load_language_model(sys.argv[1], pieces)
open("/proc/self/clear_refs", "w").write("5")
before, start, cpu_start = read_memory("VmRSS"), time.perf_counter(), time.process_time()
load_language_model(sys.argv[2], pieces)
print(time.perf_counter() - start, time.process_time() - cpu_start, read_memory("VmHWM") - before)
"""


def write_large_file(path, num_bigrams, num_trigrams):
    """Write a model over 8192 of NeMo's characters, with random numbers."""
    rng = np.random.default_rng(0)
    words = [chr(token + 100) for token in range(8192)]
    bigrams = np.unique(rng.integers(0, 8192**2, num_bigrams * 2))[::2][:num_bigrams]
    first, second = np.divmod(bigrams, 8192)
    # a 3-gram is a 2-gram and one of the 2-grams that start with its last word
    starts = np.searchsorted(first, np.arange(8193))
    prefixes = rng.integers(0, len(bigrams), num_trigrams * 2)
    num_suffixes = (starts[1:] - starts[:-1])[second[prefixes]]
    prefixes, num_suffixes = prefixes[num_suffixes > 0], num_suffixes[num_suffixes > 0]
    suffixes = starts[second[prefixes]] + (rng.random(len(prefixes)) * num_suffixes).astype(np.int64)
    prefixes, suffixes = np.divmod(
        rng.permutation(np.unique(prefixes * len(bigrams) + suffixes))[:num_trigrams], len(bigrams)
    )
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"\\data\\\nngram 1=8195\nngram 2={len(bigrams)}\nngram 3={len(prefixes)}\n\n\\1-grams:\n")
        file.writelines(f"-3.5\t{word}\t-0.5\n" for word in ["<s>", "</s>", "<unk>", *words])
        file.write("\n\\2-grams:\n")
        for a, b in zip(first.tolist(), second.tolist(), strict=True):
            file.write(f"-1.{a}\t{words[a]} {words[b]}\t-0.{b}\n")
        file.write("\n\\3-grams:\n")
        for prefix, suffix in zip(prefixes.tolist(), suffixes.tolist(), strict=True):
            file.write(f"-0.{suffix}\t{words[first[prefix]]} {words[second[prefix]]} {words[second[suffix]]}\n")
        file.write("\n\\end\\\n")
    return 8195 + len(bigrams) + len(prefixes)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak memory is read from /proc")
def test_five_million_n_grams_load_in_a_minute_and_300_mb(tmp_path):
    num_ngrams = write_large_file(tmp_path / "large.arpa", 1_500_000, 3_500_000)
    assert num_ngrams > 4_900_000
    write_arpa(tmp_path / "small.arpa", draw_orders(random.Random(0), ["d", "e"], 3))
    program = [sys.executable, "-c", LOAD_LARGE_FILE, str(tmp_path / "small.arpa"), str(tmp_path / "large.arpa")]
    output = subprocess.run(program, check=True, capture_output=True, text=True).stdout
    wall_s, cpu_s, memory_mb = map(float, re.findall(r"\S+", output.splitlines()[-1]))
    print(f"{num_ngrams} n-grams: {wall_s:.1f} s, {cpu_s:.1f} s of CPU, {memory_mb:.0f} MB")  # noqa: T201
    # the time of the processor, because other programs can delay the test
    assert cpu_s < 60
    assert memory_mb < 300

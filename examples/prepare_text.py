"""Write the sentences of transcripts and of free text, one per line, for a language model of words.

    python examples/prepare_text.py sentences.txt --data FOLDER --text novels.txt essays.txt
    python examples/train_ngram.py sentences.txt words.arpa.gz --order 3 --unknown -12

The transcripts are those of the training clips of all corpora in FOLDER, see `train_english.py`. A sentence is left out
if it is the transcript of a dev or test clip, or if five consecutive words of it are in such a transcript. The words
have the letters a to z and apostrophes, as in the transcripts.
"""

import argparse
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from packed_speech import PackedSpeech
from train_english import open_corpora

# number of consecutive words that two sentences must not have in common
OVERLAP = 5
# number of words of a sentence
MIN_WORDS, MAX_WORDS = 3, 60
SENTENCE_END = re.compile(r"(?:[.!?;:]|--|\n\s*\n)+[\"')\]]*(?:\s+|$)")
WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")


def split_sentences(text: str) -> Iterator[list[str]]:
    """Yield the words of each sentence of a text, in lower case and without punctuation.

    Sentences with digits or with letters other than a to z are left out.

    Args:
        text: any English text.
    """
    for sentence in SENTENCE_END.split(unicodedata.normalize("NFC", text).replace("\u2019", "'")):
        words = WORD.findall(sentence.lower())
        # letters, marks and digits
        num_characters = sum(unicodedata.category(character)[0] in "LMN" for character in sentence)
        num_letters = sum(len(word) - word.count("'") for word in words)
        if MIN_WORDS <= len(words) <= MAX_WORDS and num_characters == num_letters:
            yield words


def list_sequences(words: list[str]) -> set[tuple[str, ...]]:
    """List all sequences of `OVERLAP` consecutive words, and the whole sentence.

    Args:
        words: the words of a sentence.
    """
    return {tuple(words), *zip(*(words[start:] for start in range(OVERLAP)), strict=False)}


def main() -> None:
    """Write the sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, one sentence per line")
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files with free text in UTF-8")
    options = parser.parse_args()
    train, dev = open_corpora(options.data)
    held_out = [text for corpus in dev.values() for text in corpus.texts]
    for corpus in dev:
        held_out += PackedSpeech(options.data / corpus, "test").texts
    forbidden = {sequence for text in held_out for sequence in list_sequences(text.split())}
    sentences = [words for path in options.text for words in split_sentences(path.read_text(encoding="utf-8"))]
    transcripts = [text.split() for text in train.texts]
    kept = [words for words in sentences + transcripts if forbidden.isdisjoint(list_sequences(words))]
    options.output.write_text("".join(" ".join(words) + "\n" for words in kept), encoding="utf-8")
    num_dropped = len(sentences) + len(transcripts) - len(kept)
    print(f"{sum(map(len, kept)):,} words in {len(kept):,} sentences; {num_dropped} sentences left out")


if __name__ == "__main__":
    main()

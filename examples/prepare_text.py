"""Write the sentences of transcripts and of free text, one per line, for a language model of words.

    python examples/prepare_text.py sentences.txt --data FOLDER --text novels.txt essays.txt
    python examples/train_ngram.py sentences.txt words.arpa.gz --order 3 --unknown -12

The transcripts are those of the training clips of all corpora in FOLDER, see `train_english.py`. A sentence of the free
text is left out if five consecutive words of it are in a transcript of a dev or test clip, so the language model has
not seen the sentences that it is scored on. The words have the letters a to z and apostrophes, as in the transcripts.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from packed_speech import PackedSpeech
from train_english import CORPORA, open_corpora

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
    for sentence in SENTENCE_END.split(text.replace("\u2019", "'")):
        words = WORD.findall(sentence.lower())
        letters = sum(map(str.isalnum, sentence))
        if MIN_WORDS <= len(words) <= MAX_WORDS and letters == sum(
            word.count("") - 1 - word.count("'") for word in words
        ):
            yield words


def list_sequences(words: list[str]) -> Iterable[tuple[str, ...]]:
    """List all sequences of `OVERLAP` consecutive words.

    Args:
        words: the words of a sentence.
    """
    return zip(*(words[start:] for start in range(OVERLAP)), strict=False)


def main() -> None:
    """Write the sentences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, one sentence per line")
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech")
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="files with free text in UTF-8")
    options = parser.parse_args()
    train, dev = open_corpora(options.data)
    held_out = [text for corpus in dev.values() for text in corpus.texts]
    for corpus in CORPORA:
        if corpus in dev:
            held_out += PackedSpeech(options.data / corpus, "test").texts
    forbidden = {sequence for text in held_out for sequence in list_sequences(text.split())}
    num_words, num_dropped = 0, 0
    with options.output.open("w", encoding="utf-8") as file:
        for path in options.text:
            for words in split_sentences(path.read_text(encoding="utf-8", errors="replace")):
                if forbidden.isdisjoint(list_sequences(words)):
                    file.write(" ".join(words) + "\n")
                    num_words += len(words)
                else:
                    num_dropped += 1
        file.writelines(text + "\n" for text in train.texts)
    transcripts = sum(len(text.split()) for text in train.texts)
    print(f"{transcripts:,} words of transcripts, {num_words:,} words of text, {num_dropped} sentences left out")


if __name__ == "__main__":
    main()

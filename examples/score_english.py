"""Score a model on packed speech: greedy decoding, beam search, and beam search with a language model.

    python examples/train_ngram.py sentences.txt words.arpa.gz --order 3 --unknown -12
    python examples/score_english.py --model english-tdt --data FOLDER --language-model words.arpa.gz

Each row has the word and character error rates with 95 % intervals. Choose the weight of the language model and the
label bonus on dev clips. The beam search of a transducer has no label bonus.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from packed_speech import PackedSpeech

from transformers_parakeet import ParakeetASRPipeline, load_nemo
from transformers_parakeet.training import run_evaluation

# corpora and splits that are scored if the folder has them
SPLITS = (("english", "dev"), ("english", "test"), ("librispeech20", "test"), ("speechocean762", "test"))


def list_searches(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of each way of decoding, and its arguments of the pipeline."""
    yield "greedy", {}
    if options.beams > 1:
        yield f"beam {options.beams}", {"num_beams": options.beams}
    if options.language_model is not None:
        weights = {"lm_weight": options.lm_weight, "label_bonus": options.label_bonus}
        search = {"num_beams": options.beams, "language_model": str(options.language_model), "generate_kwargs": weights}
        yield f"beam {options.beams} + language model", search


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hub id, folder or .nemo file")
    parser.add_argument("--data", type=Path, required=True, help="folder with packed speech")
    parser.add_argument("--beams", type=int, default=8)
    parser.add_argument("--language-model", type=Path, help="ARPA file")
    parser.add_argument("--lm-weight", type=float, default=0.3)
    parser.add_argument("--label-bonus", type=float, default=0.0, help="score for each label, with the language model")
    parser.add_argument("--decoder", help="ctc for the CTC head of a hybrid")
    names = [f"{corpus}-{split}" for corpus, split in SPLITS]
    parser.add_argument("--splits", nargs="*", choices=names, default=names, help="default: all")
    parser.add_argument("--limit", type=int, help="number of clips per split; default: all")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    """Print a row for each split and each way of decoding."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    model, processor = load_nemo(options.model, dtype=torch.float32)
    print("| split | decoding | WER % | 95 % interval | CER % |\n| --- | --- | --- | --- | --- |")
    for corpus, split in SPLITS:
        if f"{corpus}-{split}" not in options.splits or not (options.data / corpus / "manifest.jsonl").exists():
            continue
        speech = PackedSpeech(options.data / corpus, split)
        rows = [speech[index] for index in range(min(len(speech), options.limit or len(speech)))]
        for name, arguments in list_searches(options):
            pipeline = ParakeetASRPipeline(
                model, processor=processor, task="automatic-speech-recognition", device="cpu", **arguments
            )
            rates = run_evaluation(pipeline, rows, decoder=options.decoder).rates
            wer, cer = rates["wer"], rates["cer"]
            interval = f"{100 * wer.low:.1f} to {100 * wer.high:.1f}"
            print(
                f"| {corpus} {split} | {name} | {100 * wer.value:.1f} | {interval} | {100 * cer.value:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

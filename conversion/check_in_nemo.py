"""Restores `.nemo` files in NVIDIA NeMo and compares its transcripts with recorded ones.

    python conversion/check_in_nemo.py MODEL.nemo [MODEL.nemo ...] --clips FOLDER --expected EXPECTED.json [...]

It needs an environment with nemo_toolkit[asr] and none of this package: NeMo alone says whether the files are its own.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import soundfile
import torch
from nemo.collections.asr.models import ASRModel


def transcripts(path: Path, clips: list[Path], ctc: bool) -> list[str]:
    """Restore a file and transcribe clips one by one with one of its heads."""
    model = ASRModel.restore_from(str(path), map_location="cpu").eval()
    if ctc and hasattr(model, "cur_decoder"):
        model.change_decoding_strategy(decoder_type="ctc", verbose=False)
    texts = []
    for clip in clips:
        wave, rate = soundfile.read(clip, dtype="float32")
        length = torch.tensor([len(wave)])
        assert rate == 16000
        with torch.no_grad():
            # `transcribe` would pad short clips and set dropout going; these are the steps inside it
            encoded, lengths = model(input_signal=torch.tensor(wave)[None], input_signal_length=length)[:2]
            if hasattr(model, "ctc_decoder") and ctc:
                logits = model.ctc_decoder(encoder_output=encoded)
                hypotheses = model.ctc_decoding.ctc_decoder_predictions_tensor(logits, lengths)
            elif hasattr(model, "joint"):
                hypotheses = model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths)
            else:
                hypotheses = model.decoding.ctc_decoder_predictions_tensor(encoded, lengths)
        texts.append(hypotheses[0].text)
    return texts


def recorded(truth: dict, head: str) -> list[str] | None:
    """Return the recorded transcripts of a head, clip by clip; `None` where there are none."""
    if "greedy" in truth:
        return [clip["text"] for clip in truth["greedy"][head]] if head in truth["greedy"] else None
    return [truth[head]["single"][clip]["text"] for clip in truth["clips"]] if head in truth else None


def main() -> None:
    """Print one line per file and head; leave with 1 when a transcript differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--clips", type=Path, required=True, help="folder of the recorded clips")
    parser.add_argument("--expected", nargs="+", type=Path, required=True, help="expected.json of each model")
    options = parser.parse_args()
    if len(options.models) != len(options.expected):
        parser.error(f"one --expected per model: got {len(options.expected)} for {len(options.models)}")
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    failed = False
    for path, expected in zip(options.models, options.expected, strict=True):
        truth = json.loads(expected.read_text(encoding="utf-8"))
        clips = [options.clips / f"{clip}.wav" for clip in truth["clips"]]
        for head in ("transducer", "ctc"):
            said = recorded(truth, head)
            if said is None:
                continue
            heard = transcripts(path, clips, ctc=head == "ctc")
            same = [a == b for a, b in zip(said, heard, strict=True)]
            print(f"{path.name:32} {head:10} restored, {sum(same)} of {len(same)} transcripts equal", flush=True)
            failed |= not all(same)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

"""Restores `.nemo` files in NVIDIA NeMo and compares its transcripts with recorded ones.

    python conversion/check_in_nemo.py MODEL.nemo [MODEL.nemo ...] --clips FOLDER --expected EXPECTED.json [...]

It needs an environment with nemo_toolkit[asr] and without this package, so that the result depends on NeMo alone.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import soundfile
import torch
from nemo.collections.asr.models import ASRModel


def transcribe(path: Path, clips: list[Path], use_ctc: bool) -> list[str]:
    """Restore a file and transcribe clips one by one.

    Args:
        path: the `.nemo` file.
        clips: audio files of 16 kHz.
        use_ctc: decode with the CTC head of a hybrid instead of its transducer.

    Returns:
        One text per clip.
    """
    model = ASRModel.restore_from(str(path), map_location="cpu").eval()
    if use_ctc and hasattr(model, "cur_decoder"):
        model.change_decoding_strategy(decoder_type="ctc", verbose=False)
    texts = []
    for clip in clips:
        samples, sampling_rate = soundfile.read(clip, dtype="float32")
        length = torch.tensor([len(samples)])
        assert sampling_rate == 16000
        with torch.no_grad():
            # the steps of `model.transcribe`, which would also pad short clips and enable dropout
            encoded, lengths = model(input_signal=torch.tensor(samples)[None], input_signal_length=length)[:2]
            if hasattr(model, "ctc_decoder") and use_ctc:
                logits = model.ctc_decoder(encoder_output=encoded)
                hypotheses = model.ctc_decoding.ctc_decoder_predictions_tensor(logits, lengths)
            elif hasattr(model, "joint"):
                hypotheses = model.decoding.rnnt_decoder_predictions_tensor(encoded, lengths)
            else:
                hypotheses = model.decoding.ctc_decoder_predictions_tensor(encoded, lengths)
        texts.append(hypotheses[0].text)
    return texts


def recorded_texts(expected: dict, head: str) -> list[str] | None:
    """Return the recorded transcripts of a head, one per clip; None if the model does not have the head.

    Args:
        expected: content of an expected.json in one of its two layouts.
        head: `"transducer"` or `"ctc"`.
    """
    if "greedy" in expected:
        return [clip["text"] for clip in expected["greedy"][head]] if head in expected["greedy"] else None
    return [expected[head]["single"][clip]["text"] for clip in expected["clips"]] if head in expected else None


def main() -> None:
    """Print one line per file and head; the exit status is 1 if a transcript differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--clips", type=Path, required=True, help="folder of the recorded clips")
    parser.add_argument("--expected", nargs="+", type=Path, required=True, help="expected.json of each model")
    options = parser.parse_args()
    if len(options.models) != len(options.expected):
        parser.error(f"one --expected per model: got {len(options.expected)} for {len(options.models)}")
    logging.getLogger("nemo_logger").setLevel(logging.ERROR)
    failed = False
    for path, expected_path in zip(options.models, options.expected, strict=True):
        expected = json.loads(expected_path.read_text(encoding="utf-8"))
        clips = [options.clips / f"{clip}.wav" for clip in expected["clips"]]
        for head in ("transducer", "ctc"):
            references = recorded_texts(expected, head)
            if references is None:
                continue
            hypotheses = transcribe(path, clips, use_ctc=head == "ctc")
            is_equal = [a == b for a, b in zip(references, hypotheses, strict=True)]
            print(
                f"{path.name:32} {head:10} restored, {sum(is_equal)} of {len(is_equal)} transcripts equal", flush=True
            )
            failed |= not all(is_equal)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()

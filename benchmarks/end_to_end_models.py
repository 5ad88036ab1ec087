"""Writes a model with random weights for benchmarks/end_to_end.py, in the format of one engine.

    python benchmarks/end_to_end_models.py FORMAT SHAPE SOURCE TARGET

FORMAT is `float32`, `int8`, `onnx-float32`, `onnx-int8` or `nemo`. Except for `float32`, SOURCE is the folder that
`float32` wrote. `end_to_end.py` calls this script in a process of its own for each file.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import long_audio
import torch

import transformers_parakeet as tp

# sizes of parakeet-tdt_ctc-110m and parakeet-tdt-0.6b-v3; `tiny` is for tests
SHAPES: dict[str, dict[str, Any]] = {
    "110M": {
        "vocab_size": 1025,
        "num_decoder_layers": 1,
        "encoder": {"hidden_size": 512, "num_hidden_layers": 17, "intermediate_size": 2048, "num_mel_bins": 80},
    },
    "0.6B": {
        "vocab_size": 8193,
        "num_decoder_layers": 2,
        "encoder": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "num_mel_bins": 128},
    },
    "tiny": {
        "vocab_size": 65,
        "num_decoder_layers": 1,
        "encoder": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "num_mel_bins": 80},
    },
}
NUM_HEADS, DECODER_WIDTH = 8, 640
# number of tokens before the first word in the vocabulary of `long_audio.build_tokenizer`
NUM_SPECIAL_TOKENS = 3
# standard deviation of the weights of the encoder blocks
BLOCK_STD = 0.005
# seconds of noise on which the bias of the blank is shifted
TUNING_SECONDS = 60


@torch.no_grad()
def randomise_weights(model: Any) -> None:
    """Set random weights with which the labels depend on the audio, so that rounding changes few of them.

    Args:
        model: TDT model; changed in place.
    """
    for name, parameter in model.named_parameters():
        if name.startswith(("decoder.", "joint.", "encoder_projector.")):
            parameter.normal_(std=1.0 if "embedding" in name else 0.08)
        elif name.startswith("encoder.layers.") and parameter.ndim > 1:
            # with the default of 0.02, attention adds almost the same vector to all frames
            parameter.normal_(std=BLOCK_STD)
        elif name.startswith("encoder.subsampling.") and parameter.ndim > 1:
            # keeps the variance through a layer with ReLU
            torch.nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    # special tokens and the full stop are never emitted
    model.joint.head.bias[:NUM_SPECIAL_TOKENS] -= long_audio.DURATION_SHIFT


@torch.no_grad()
def write_float32(shape: str, source: Path, target: Path) -> None:
    """Write a TDT model and its processor in the format of transformers.

    Every token of the model is a word, so texts can be compared instead of tokens. The bias of the blank is shifted
    until the model emits `long_audio.LABELS_PER_SECOND`.

    Args:
        shape: a name in `SHAPES`.
        source: `.npy` file of noise, (S,) float32 samples at 16 kHz.
        target: folder to write.
    """
    import numpy as np

    sizes = SHAPES[shape]
    torch.manual_seed(0)
    tokenizer = long_audio.build_tokenizer(tp, "tdt", sizes["vocab_size"])
    encoder = {**sizes["encoder"], "num_attention_heads": NUM_HEADS, "subsampling_conv_channels": 256}
    biases = {"attention_bias": False, "convolution_bias": False, "scale_input": False}
    config = tp.ParakeetTDTConfig(
        vocab_size=sizes["vocab_size"],
        blank_token_id=sizes["vocab_size"] - 1,
        pad_token_id=tokenizer.pad_token_id,
        decoder_hidden_size=DECODER_WIDTH,
        num_decoder_layers=sizes["num_decoder_layers"],
        encoder_config={**encoder, **biases},
    )
    model = tp.ParakeetForTDT(config).eval()
    model.generation_config.decoder_start_token_id = config.blank_token_id
    randomise_weights(model)
    extractor = tp.ParakeetFeatureExtractor(feature_size=encoder["num_mel_bins"])
    samples = np.load(source)[: TUNING_SECONDS * long_audio.SAMPLING_RATE]
    features = extractor(samples, sampling_rate=long_audio.SAMPLING_RATE)["input_features"]
    long_audio.shift_blank_bias(model, features, len(samples) / long_audio.SAMPLING_RATE)
    model.save_pretrained(target)
    tp.ParakeetProcessor(extractor, tokenizer).save_pretrained(target)


def write_int8(shape: str, source: Path, target: Path) -> None:
    """Write the int8 model. Its other layers have the dtype that the command `parakeet` would choose.

    Args:
        shape: not used.
        source: folder of the float32 model.
        target: folder to write.
    """
    from transformers_parakeet.transcription import load_pipeline

    pipeline = load_pipeline(source, quantize="int8")
    pipeline.model.save_pretrained(target)
    pipeline.processor.save_pretrained(target)


def create_onnx_writer(quantize: str | None) -> Callable[[str, Path, Path], None]:
    """Create the function that writes a folder for onnx-asr.

    Args:
        quantize: `"int8"` or `None`, as in `export_onnx`.
    """

    def write(shape: str, source: Path, target: Path) -> None:
        """Write the folder."""
        from transformers_parakeet.onnx_export import export_onnx

        export_onnx(*tp.load_nemo(source), target, quantize=quantize)

    return write


def write_nemo(shape: str, source: Path, target: Path) -> None:
    """Write a `.nemo` file into a folder.

    Args:
        shape: not used.
        source: folder of the float32 model.
        target: folder to write.
    """
    target.mkdir()
    tp.export_nemo(*tp.load_nemo(source), target / "model.nemo")


WRITERS: dict[str, Callable[[str, Path, Path], None]] = {
    "float32": write_float32,
    "int8": write_int8,
    "onnx-float32": create_onnx_writer(None),
    "onnx-int8": create_onnx_writer("int8"),
    "nemo": write_nemo,
}


def main() -> None:
    """Write one folder under another name, and rename it when it is complete."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=WRITERS)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args()
    partial = args.target.with_name(args.target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    WRITERS[args.format](args.shape, args.source, partial)
    partial.rename(args.target)


if __name__ == "__main__":
    main()

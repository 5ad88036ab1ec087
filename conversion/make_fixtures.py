"""Writes a `.nemo` file with random weights and the shape of a released checkpoint, for benchmarks.

    python conversion/make_fixtures.py OUT.nemo --tokenizer tests/data/parakeet-tdt-0.6b-v3.model

The default is Parakeet TDT 0.6B v3: 24 layers of width 1024, 627 M parameters, 2.5 GB.
"""

import argparse
from pathlib import Path

import torch

import transformers_parakeet as tp
from transformers_parakeet.nemo import build_tokenizer


def main() -> None:
    """Build a random TDT model and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .nemo file to write")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a SentencePiece model")
    parser.add_argument("--layers", type=int, default=24, help="layers of the encoder")
    parser.add_argument("--width", type=int, default=1024, help="width of the encoder")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer([options.tokenizer.read_bytes()], "tdt")
    config = tp.ParakeetTDTConfig(
        vocab_size=len(tokenizer),
        blank_token_id=len(tokenizer) - 1,
        pad_token_id=tokenizer.pad_token_id,
        joint_dropout=0.2,
        decoder_dropout=0.2,
        encoder_config={
            "hidden_size": options.width,
            "num_hidden_layers": options.layers,
            "intermediate_size": 4 * options.width,
            "num_mel_bins": 128,
            "attention_bias": False,
            "convolution_bias": False,
            "scale_input": False,
        },
    )
    model = tp.ParakeetForTDT(config).eval()
    processor = tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(feature_size=128), tokenizer, decoder_type="tdt")
    tp.export_nemo(model, processor, options.out)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.out}: {num_parameters / 1e6:.1f} M parameters, {options.out.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()

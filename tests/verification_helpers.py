"""Writes tiny transducers that stock transformers can decode."""

import torch
from conftest import encoder_fields, tiny_tokenizer

import transformers_parakeet as tp


def save_transducer(kind, folder):
    """Save a random transducer that stock transformers can decode: it never emits a label without advancing."""
    tokenizer = tiny_tokenizer(kind)
    size = len(tokenizer)
    torch.manual_seed(3)
    config = getattr(tp, f"Parakeet{kind.upper()}Config")(
        vocab_size=size,
        pad_token_id=tokenizer.pad_token_id,
        blank_token_id=size - 1,
        decoder_hidden_size=24,
        encoder_config=encoder_fields(),
    )
    model = getattr(tp, f"ParakeetFor{kind.upper()}")(config).eval()
    with torch.no_grad():
        model.joint.head.bias[size - 1] += 1.5 if kind == "tdt" else 2.0
        model.joint.head.bias[size : size + 1] -= 50.0
    model.save_pretrained(folder)
    tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tokenizer, decoder_type=kind).save_pretrained(folder)

"""Tests of the encoder in `torch.export`: one program for clips of all lengths."""

import pytest
import torch
from conftest import encoder_fields

import transformers_parakeet as tp
from transformers_parakeet.networks.attention_layout import relative_shift


@pytest.mark.parametrize("num_queries", [1, 2, 5])
def test_relative_shift_ignores_further_columns(num_queries):
    scores = torch.randn(3, num_queries, 2 * num_queries - 1)
    expected = torch.stack([scores[:, i, num_queries - 1 - i : 2 * num_queries - 1 - i] for i in range(num_queries)], 1)
    assert torch.equal(relative_shift(scores, num_queries), expected)
    padded = torch.nn.functional.pad(scores, (0, 1), value=torch.nan)
    assert torch.equal(relative_shift(padded, num_queries), expected)


@torch.no_grad()
def test_an_exported_encoder_accepts_every_number_of_frames():
    torch.manual_seed(0)
    encoder = tp.ParakeetEncoder(tp.ParakeetEncoderConfig(**encoder_fields(num_hidden_layers=1))).eval()
    inputs = {"input_features": torch.randn(2, 123, 80), "attention_mask": torch.ones(2, 123, dtype=torch.bool)}
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(
        encoder, (), inputs, dynamic_shapes=dict.fromkeys(inputs, sizes), strict=False
    ).module()
    # 2 encoder frames, which an earlier graph excluded, to more frames than the subsampling computes at once
    for batch_size, num_frames in ((1, 9), (2, 16), (3, 17), (2, 1000), (1, 6100)):
        features = torch.randn(batch_size, num_frames, 80)
        lengths = torch.arange(num_frames, num_frames - batch_size, -1)
        mask = torch.arange(num_frames) < lengths[:, None]
        exported = program(input_features=features, attention_mask=mask)
        eager = encoder(input_features=features, attention_mask=mask)
        valid = eager.attention_mask.bool()
        assert torch.equal(exported.attention_mask, eager.attention_mask)
        # measured: 3e-6
        difference = (exported.last_hidden_state[valid] - eager.last_hidden_state[valid]).abs().max()
        assert difference < 1e-5

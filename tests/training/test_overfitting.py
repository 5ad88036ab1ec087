"""Trains tiny transducers on twenty recorded utterances until they know them by heart."""

import io
import json

import jiwer
import pytest
import soundfile
import torch
from conftest import TESTS, encoder_fields

import transformers_parakeet as tp

SPEECH = TESTS.parents[1] / "shared" / "data" / "speechocean762"
LETTERS = " 'abcdefghijklmnopqrstuvwxyz"
PAD, BLANK = len(LETTERS), len(LETTERS) + 1
UTTERANCES, STEPS, EVERY = 20, 600, 20

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not SPEECH.exists(), reason="needs speech in ../shared/data")]

HEADS = {
    "rnnt": (tp.ParakeetForRNNT, tp.ParakeetRNNTConfig, {}),
    "tdt": (tp.ParakeetForTDT, tp.ParakeetTDTConfig, {"loss_sigma": 0.02, "loss_omega": 0.1}),
    "hybrid": (tp.ParakeetForTDT, tp.ParakeetTDTConfig, {"ctc_head": True, "ctc_loss_weight": 0.3}),
}


def utterances() -> list[tuple[torch.Tensor, str]]:
    """The first short utterances of as many speakers: samples and text."""
    rows = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train" and row["duration"] < 3]
    chosen = list({row["speaker"]: row for row in reversed(rows)}.values())[:UTTERANCES]
    found = []
    for row in chosen:
        with (SPEECH / row["tar"]).open("rb") as file:
            file.seek(row["offset"])
            samples, rate = soundfile.read(io.BytesIO(file.read(row["nbytes"])), dtype="float32")
        found.append((tp.load_audio(samples, sampling_rate=rate), row["text"]))
    return found


def texts_of(model, batch) -> list[str]:
    """Greedy transcripts."""
    sequences = model.eval().generate(**batch).sequences
    model.train()
    return ["".join(LETTERS[token] for token in row if token < PAD) for row in sequences.tolist()]


def build(head: str):
    """A random model, one kind of label per letter."""
    torch.manual_seed(0)
    model_class, config_class, extra = HEADS[head]
    encoder = encoder_fields(
        hidden_size=96, intermediate_size=192, subsampling_conv_channels=32, dropout=0.0, activation_dropout=0.0,
        attention_dropout=0.0, initializer_range=0.05,
    )  # fmt: skip
    fields = {"vocab_size": BLANK + 1, "pad_token_id": PAD, "blank_token_id": BLANK, "decoder_hidden_size": 96}
    fields |= {"num_decoder_layers": 1, "loss_reduction": "mean_volume", "encoder_config": encoder}
    model = model_class(config_class(**fields, **extra)).train()
    model.generation_config.decoder_start_token_id = BLANK
    return model


@pytest.mark.parametrize("head", list(HEADS))
def test_twenty_utterances_are_learnt_by_heart(head: str):
    clips = utterances()
    wanted = [text for _, text in clips]
    assert len(clips) == UTTERANCES
    batch = tp.ParakeetFeatureExtractor()([audio for audio, _ in clips], sampling_rate=16000, return_tensors="pt")
    rows = [torch.tensor([LETTERS.index(letter) for letter in text]) for text in wanted]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    model = build(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, STEPS, pct_start=0.1)
    for step in range(STEPS):
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVERY == EVERY - 1 and outputs.loss < 0.3 and texts_of(model, batch) == wanted:
            break
    rate = jiwer.wer(wanted, texts_of(model, batch))
    print(f"{head}: word error rate {rate:.3f} after {step + 1} steps, loss {outputs.loss.item():.4f}")  # noqa: T201
    assert rate == 0.0

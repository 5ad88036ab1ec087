"""Trains tiny transducers on twenty recorded utterances until they reproduce the transcripts."""

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
PAD_ID, BLANK_ID = len(LETTERS), len(LETTERS) + 1
NUM_UTTERANCES, NUM_STEPS, EVALUATION_INTERVAL = 20, 600, 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SPEECH.exists(), reason="needs packed speech in ../shared/data/speechocean762"),
]

HEADS = {
    "rnnt": (tp.ParakeetForRNNT, tp.ParakeetRNNTConfig, {}),
    "tdt": (tp.ParakeetForTDT, tp.ParakeetTDTConfig, {"loss_sigma": 0.02, "loss_omega": 0.1}),
    "hybrid": (tp.ParakeetForTDT, tp.ParakeetTDTConfig, {"ctc_head": True, "ctc_loss_weight": 0.3}),
}


def load_utterances():
    """Return samples and text of the first short utterance of each of twenty speakers."""
    entries = [json.loads(line) for line in (SPEECH / "manifest.jsonl").read_text().splitlines()]
    entries = [entry for entry in entries if entry["split"] == "train" and entry["duration"] < 3]
    # reversed, so that the first utterance of a speaker replaces the later ones
    first_of_speakers = {entry["speaker"]: entry for entry in reversed(entries)}
    utterances = []
    for entry in list(first_of_speakers.values())[:NUM_UTTERANCES]:
        with (SPEECH / entry["tar"]).open("rb") as file:
            file.seek(entry["offset"])
            samples, sampling_rate = soundfile.read(io.BytesIO(file.read(entry["nbytes"])), dtype="float32")
        utterances.append((tp.load_audio(samples, sampling_rate=sampling_rate), entry["text"]))
    return utterances


def transcribe(model, batch):
    """Return the greedy transcripts of a batch; leaves the model in training mode."""
    sequences = model.eval().generate(**batch).sequences
    model.train()
    return ["".join(LETTERS[token] for token in row if token < PAD_ID) for row in sequences.tolist()]


def create_letter_model(head):
    """Return a random model whose labels are letters."""
    torch.manual_seed(0)
    model_class, config_class, head_fields = HEADS[head]
    encoder_config = encoder_fields(
        hidden_size=96,
        intermediate_size=192,
        subsampling_conv_channels=32,
        dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        initializer_range=0.05,
    )
    config = config_class(
        vocab_size=BLANK_ID + 1,
        pad_token_id=PAD_ID,
        blank_token_id=BLANK_ID,
        decoder_hidden_size=96,
        num_decoder_layers=1,
        loss_reduction="mean_volume",
        encoder_config=encoder_config,
        **head_fields,
    )
    return model_class(config).train()


@pytest.mark.parametrize("head", list(HEADS))
def test_twenty_utterances_are_learnt_by_heart(head):
    utterances = load_utterances()
    references = [text for _, text in utterances]
    assert len(utterances) == NUM_UTTERANCES
    clips = [samples for samples, _ in utterances]
    batch = tp.ParakeetFeatureExtractor()(clips, sampling_rate=16000, return_tensors="pt")
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor([LETTERS.index(letter) for letter in text]) for text in references],
        batch_first=True,
        padding_value=-100,
    )
    model = create_letter_model(head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, NUM_STEPS, pct_start=0.1)
    for step in range(NUM_STEPS):
        outputs = model(**batch, labels=labels)
        outputs.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        is_evaluated = step % EVALUATION_INTERVAL == EVALUATION_INTERVAL - 1 and outputs.loss < 0.3
        if is_evaluated and transcribe(model, batch) == references:
            break
    rate = jiwer.wer(references, transcribe(model, batch))
    print(f"{head}: word error rate {rate:.3f} after {step + 1} steps, loss {outputs.loss.item():.4f}")  # noqa: T201
    assert rate == 0.0

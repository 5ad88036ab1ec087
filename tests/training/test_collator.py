"""`SpeechCollator`: features, labels, broken clips, and the problems that it counts."""

import multiprocessing

import numpy as np
import pytest
import torch
from conftest import noise
from torch.utils.data import DataLoader
from training_helpers import HEADS, compute_features, create_model, record_warnings, sentence_rows

import transformers_parakeet as tp
from transformers_parakeet.decoding import count_ctc_frames
from transformers_parakeet.training import SpeechCollator

ROWS = sentence_rows()


@pytest.fixture
def warnings(monkeypatch):
    """Warnings of the collator, as texts."""
    return record_warnings(monkeypatch, "collator")


@pytest.fixture(scope="module")
def processor():
    """The processor of a small CTC model."""
    return create_model("ctc")[1]


def has_finite_gradients(model):
    """Return whether all gradients of a model are finite."""
    return all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)


def test_a_batch_equals_the_output_of_the_processor_except_for_the_padding_of_labels(processor):
    rows = [{"audio": noise(1.0), "text": "where is my brother now"}, {"audio": noise(0.6, 1), "text": "go"}]
    batch = SpeechCollator(processor, dither=0.0)(rows)
    expected = processor([row["audio"] for row in rows], text=[row["text"] for row in rows], sampling_rate=16000)
    num_frames = batch["input_features"].shape[1]
    assert torch.equal(batch["attention_mask"], expected["attention_mask"][:, :num_frames])
    assert not expected["attention_mask"][:, num_frames:].any()
    assert torch.allclose(batch["input_features"], expected["input_features"][:, :num_frames], atol=1e-5)
    is_padding = batch["labels"] == -100
    assert torch.equal(is_padding, expected["labels"] == processor.tokenizer.pad_token_id)
    assert torch.equal(batch["labels"][~is_padding], expected["labels"][~is_padding])
    assert is_padding.any()


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_has_the_inputs_of_our_models_only(head):
    _, processor = create_model(head)
    batch = SpeechCollator(processor)(ROWS[:2])
    assert {name: str(values.dtype) for name, values in batch.items()} == {
        "input_features": "torch.float32",
        "attention_mask": "torch.bool",
        "labels": "torch.int64",
    }


def test_the_features_of_a_clip_do_not_depend_on_the_batch(processor):
    collator = SpeechCollator(processor)
    batch = collator(ROWS[:5])
    for index, row in enumerate(ROWS[:5]):
        alone = collator([row])
        assert torch.equal(batch["input_features"][index][batch["attention_mask"][index]], alone["input_features"][0])


def test_features_and_labels_can_be_precomputed(processor):
    collator = SpeechCollator(processor, dither=0.0)
    batch = collator(ROWS[:3])
    names = ("input_features", "attention_mask", "labels")
    rows = [
        {"input_features": features[mask].tolist(), "labels": labels.tolist()}
        for features, mask, labels in zip(*(batch[name] for name in names), strict=True)
    ]
    precomputed = collator(rows)
    assert precomputed.keys() == batch.keys()
    assert all(torch.equal(precomputed[name], batch[name]) for name in names)
    with_text = collator([{**row, "labels": [5]} for row in compute_features(ROWS[:1], processor)])
    assert with_text["labels"].tolist() == [[5]]


def test_a_batch_without_transcripts_has_no_labels(processor):
    assert SpeechCollator(processor)([{"audio": noise(1.0)}]).keys() == {"input_features", "attention_mask"}


@pytest.mark.parametrize("head", HEADS)
def test_labels_padded_with_the_pad_token_give_the_same_loss(head):
    model, processor = create_model(head)
    rows = [{"audio": noise(1.5), "text": "what do you mean sir"}, {"audio": noise(1.0, 1), "text": ""}]
    batch = SpeechCollator(processor)(rows)
    model.eval()
    loss = model(**batch).loss
    assert loss.isfinite()
    labels = batch["labels"].masked_fill(batch["labels"] == -100, processor.tokenizer.pad_token_id)
    assert torch.equal(model(**{**batch, "labels": labels}).loss, loss)


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_of_empty_transcripts_has_a_finite_loss_and_finite_gradients(head):
    model, processor = create_model(head)
    batch = SpeechCollator(processor)([{"audio": noise(1.0), "text": ""}] * 2)
    assert batch["labels"].tolist() == [[-100], [-100]]
    loss = model.eval()(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert has_finite_gradients(model)


def broken_rows(folder):
    """Return rows that cannot be used, and for each a text by which messages name it."""
    (folder / "bad.wav").write_bytes(b"no audio at all " * 50)
    rows = [
        {"audio": str(folder / "bad.wav"), "text": "a"},
        {"audio": str(folder / "missing.flac"), "text": "b"},
        {"audio": np.full(16000, np.nan, np.float32), "text": "c", "id": "not-finite"},
        {"audio": {"bytes": b"x" * 100, "path": "packed.ogg"}, "text": "d"},
        {"audio": np.zeros(100, np.float32), "text": "e", "id": "too-short"},
    ]
    return rows, ["bad.wav", "missing.flac", "not-finite", "packed.ogg", "too-short"]


def test_the_error_about_a_broken_clip_names_it(processor, tmp_path):
    for row, name in zip(*broken_rows(tmp_path), strict=True):
        with pytest.raises(tp.AudioError, match=name) as error:
            SpeechCollator(processor)([ROWS[0], row])
        assert str(error.value).count(name) == 1


def test_broken_clips_can_be_skipped_with_a_warning_and_are_counted(processor, tmp_path, warnings):
    rows, names = broken_rows(tmp_path)
    collator = SpeechCollator(processor, skip_broken=True)
    batch = collator([ROWS[0], *rows, ROWS[1]])
    expected = SpeechCollator(processor)([ROWS[0], ROWS[1]])
    assert all(torch.equal(batch[name], expected[name]) for name in expected)
    assert collator.counts.as_dict() == {"broken_clips": 5}
    assert [name in text for name, text in zip(names, warnings, strict=True)] == [True] * 5
    assert warnings[2].endswith("skipped (3 so far)")


def test_silence_replaces_a_batch_without_a_readable_clip(processor, tmp_path, warnings):
    rows, _ = broken_rows(tmp_path)
    batch = SpeechCollator(processor, skip_broken=True)(rows[:1])
    assert batch["labels"].tolist() == [[-100]]
    # one second
    assert batch["attention_mask"].sum() == 100
    assert "second of silence" in warnings[-1]


def test_worker_processes_share_the_counts(processor, tmp_path):
    rows = [{"audio": str(tmp_path / f"{index}.wav"), "text": "a"} for index in range(4)]
    collator = SpeechCollator(processor, skip_broken=True)
    context = multiprocessing.get_context("fork")
    loader = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collator, multiprocessing_context=context)
    assert len(list(loader)) == 4
    assert collator.counts.as_dict() == {"broken_clips": 4}


@pytest.mark.parametrize("head", HEADS)
def test_a_transcript_too_long_for_ctc_is_named_and_counted(head, warnings):
    model, processor = create_model(head)
    text = " ".join(row["text"] for row in ROWS)
    collator = SpeechCollator(processor, ctc=True if head == "hybrid" else None)
    batch = collator([{"audio": noise(0.5), "text": text, "id": "hasty"}])
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert has_finite_gradients(model)
    if head == "ctc":
        assert loss == 0
    # 0.5 s are 50 mel frames, which are 7 encoder frames
    is_expected = ["hasty" in text and "the clip has only 7" in text for text in warnings]
    assert is_expected == ([True] if head in ("ctc", "hybrid") else [])
    assert collator.counts.as_dict() == ({"transcripts_too_long": 1} if is_expected else {})


@pytest.mark.parametrize(("labels", "frames"), [([], 0), ([3], 1), ([3, 4, 3], 3), ([3, 3, 3, 4, 4], 8)])
def test_ctc_needs_a_frame_per_label_and_one_between_equal_labels(labels, frames):
    assert count_ctc_frames(labels) == frames


def test_the_first_transcript_with_unknown_characters_is_named(processor, warnings):
    collator = SpeechCollator(processor)
    collator([{"audio": noise(1.0), "text": "GO"}, {"audio": noise(1.0), "text": "NOW"}])
    (warning,) = warnings
    assert "characters outside the vocabulary" in warning
    assert "'GO'" in warning
    assert collator.counts.as_dict() == {"transcripts_with_unknown_characters": 2}

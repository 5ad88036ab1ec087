"""`ParakeetTrainer` and its collator: options, columns, counts, and what evaluation makes of clips and tokens."""

import logging

import numpy as np
import pytest
import torch
from conftest import ctc_model
from training_helpers import arguments, features_of, sentence_rows, small
from transformers import EvalPrediction

import transformers_parakeet as tp
from transformers_parakeet.generation_parakeet import ParakeetCTCGenerateOutput, ParakeetRNNTGenerateOutput
from transformers_parakeet.training.trainer import ErrorRates, ParakeetTrainer, SpeechCollator, generated_tokens

ROWS = sentence_rows()


@pytest.fixture
def warnings_of(monkeypatch):
    """Warnings of the module, as texts."""
    texts = []
    monkeypatch.setattr(
        logging.getLogger("transformers_parakeet.training.trainer"),
        "warning",
        lambda text, *args, **kwargs: texts.append(text),
    )
    return texts


def evaluating(folder, rows, head="ctc", collator=None, **changes):
    """A trainer that evaluates, three clips per batch."""
    model, processor = small(head)
    return ParakeetTrainer(
        model,
        arguments(folder, 1, per_device_eval_batch_size=3),
        data_collator=collator,
        eval_dataset=rows,
        processing_class=processor,
        **changes,
    )


# options


def test_label_smoothing_is_refused_by_name(tmp_path):
    model, processor = small("ctc")
    settings = arguments(tmp_path, 1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0.*got 0\.1"):
        ParakeetTrainer(model, settings, processing_class=processor)


def test_columns_reach_the_collator_without_arguments_of_training(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list([{"audio": row["audio"], "text": row["text"]} for row in ROWS[:2]])
    model, processor = small("ctc")
    trainer = ParakeetTrainer(model, train_dataset=data, processing_class=processor)
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].shape[0] == 2


def test_the_collator_may_come_by_position(tmp_path):
    model, processor = small("ctc")
    collator = SpeechCollator(processor, seed=5)
    trainer = ParakeetTrainer(model, arguments(tmp_path, 1), collator, ROWS[:1], processing_class=processor)
    assert trainer.data_collator is collator
    assert trainer.train_dataset == ROWS[:1]


# counts


def test_unknown_characters_are_told_once_and_counted(tmp_path, warnings_of):
    model, processor = small("ctc")
    rows = [{**row, "text": row["text"].upper()} for row in features_of(ROWS, processor)]
    rows[0]["text"] = "go"
    trainer = ParakeetTrainer(model, arguments(tmp_path, 4), train_dataset=rows, processing_class=processor)
    trainer.train()
    told = [text for text in warnings_of if "vocabulary lacks" in text]
    assert len(told) == 1
    assert trainer.state.log_history[-1]["transcripts_with_unknown_characters"] == 19


# evaluation


def test_a_broken_clip_keeps_its_place_in_evaluation(tmp_path, warnings_of):
    rows = [ROWS[0], {"audio": str(tmp_path / "missing.wav"), "text": "nothing"}, ROWS[1], ROWS[2]]
    _, processor = small("ctc")
    trainer = evaluating(tmp_path, rows, collator=SpeechCollator(processor, skip_broken=True))
    first, second = trainer.get_eval_dataloader()
    assert (len(first["labels"]), len(second["labels"])) == (3, 1)
    # a second of silence, in which nothing is said
    assert first["attention_mask"].sum(-1)[1] == 100
    silence = SpeechCollator(processor, dither=0.0)([{"audio": np.zeros(16000, np.float32), "text": ""}])
    assert torch.equal(first["input_features"][1, :100], silence["input_features"][0])
    assert first["labels"][1].unique().tolist() == [-100]
    whole = SpeechCollator(processor, dither=0.0)([rows[0], rows[2]])
    assert torch.equal(first["labels"][[0, 2], : whole["labels"].shape[1]], whole["labels"])
    frames = whole["attention_mask"].sum(-1).max()
    assert torch.equal(first["input_features"][[0, 2], :frames], whole["input_features"])
    assert len(trainer.predict(rows).label_ids) == 4
    # once by the loader above, once by `predict`
    assert trainer.data_collator.counts.as_dict() == {"broken_clips": 2}
    assert "silence takes its place" in warnings_of[0]
    # training leaves it out
    assert len(trainer.data_collator(rows)["labels"]) == 3


def test_a_ctc_processor_knows_its_blank_and_scores_unknown_tokens():
    _, processor = ctc_model()
    tokenizer = processor.tokenizer
    assert processor.blank_token_id == tokenizer.pad_token_id != tokenizer.unk_token_id
    the = tokenizer("the", add_special_tokens=False)["input_ids"]
    labels = np.array([[*the, tokenizer.unk_token_id, -100]])
    heard = np.array([[*the, -100, -100]])
    rates = ErrorRates(processor, normalize=str)
    assert "<unk>" in rates.texts(labels)[0]
    assert rates(EvalPrediction(predictions=heard, label_ids=labels))["cer"] > 0


def test_generated_tokens_of_every_output():
    ctc = tp.ParakeetCTCConfig(vocab_size=5, pad_token_id=4)
    frames = torch.tensor([[4, 1, 1, 4, 1, 2], [4, 4, 4, 4, 4, 4]])
    expected = [[1, 1, 2], [-100] * 3]
    assert generated_tokens(ParakeetCTCGenerateOutput(sequences=frames), ctc).tolist() == expected
    rnnt = tp.ParakeetRNNTConfig(vocab_size=5, pad_token_id=0, blank_token_id=4)
    steps = ParakeetRNNTGenerateOutput(sequences=torch.tensor([[4, 1, 1, 4, 2, 0]]), durations=torch.zeros(1, 6))
    assert generated_tokens(steps, rnnt).tolist() == [[1, 1, 2]]


@pytest.mark.parametrize("head", ["ctc", "hybrid"])
def test_outputs_as_a_dict_score_as_those_of_a_tensor(head, tmp_path):
    options = {"decoder": "ctc"} if head == "hybrid" else {}
    scores = [
        evaluating(tmp_path, ROWS[:4], head, generate_kwargs={**options, "return_dict_in_generate": as_dict}).evaluate()
        for as_dict in (False, True)
    ]
    assert scores[0]["eval_cer"] == scores[1]["eval_cer"]

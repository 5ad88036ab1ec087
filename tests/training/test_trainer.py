"""`ParakeetTrainer`: its options, what it logs, and how it evaluates."""

import numpy as np
import pytest
import torch
from training_helpers import (
    HEADS,
    compute_features,
    create_model,
    record_warnings,
    sentence_rows,
    training_arguments,
)
from transformers import pipeline

from transformers_parakeet.decoding.hypotheses import ClipSteps, collapse_ctc, collect_hypotheses
from transformers_parakeet.training import ErrorRates, ParakeetTrainer, SpeechCollator, error_rates
from transformers_parakeet.training.trainer import extract_tokens

ROWS = sentence_rows()


@pytest.fixture
def warnings(monkeypatch):
    """Warnings of the collator, as texts."""
    return record_warnings(monkeypatch, "collator")


def create_evaluating_trainer(folder, rows, head="ctc", collator=None, **options):
    """Return a trainer that evaluates a small model in batches of three clips."""
    model, processor = create_model(head)
    return ParakeetTrainer(
        model,
        training_arguments(folder, 1, per_device_eval_batch_size=3),
        data_collator=collator,
        eval_dataset=rows,
        processing_class=processor,
        **options,
    )


# options


def test_label_smoothing_is_refused(tmp_path):
    model, processor = create_model("ctc")
    settings = training_arguments(tmp_path, 1, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"`label_smoothing_factor` must be 0, got 0\.1"):
        ParakeetTrainer(model, settings, processing_class=processor)


def test_columns_reach_the_collator_without_training_arguments(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    data = datasets.Dataset.from_list([{"audio": row["audio"], "text": row["text"]} for row in ROWS[:2]])
    model, processor = create_model("ctc")
    trainer = ParakeetTrainer(model, train_dataset=data, processing_class=processor)
    (batch,) = trainer.get_train_dataloader()
    assert batch["labels"].shape[0] == 2


def test_the_collator_can_be_a_positional_argument(tmp_path):
    model, processor = create_model("ctc")
    collator = SpeechCollator(processor, seed=5)
    trainer = ParakeetTrainer(model, training_arguments(tmp_path, 1), collator, ROWS[:1], processing_class=processor)
    assert trainer.data_collator is collator
    assert trainer.train_dataset == ROWS[:1]


def test_dither_is_added_in_training_only(tmp_path):
    model, processor = create_model("ctc")
    rows = [{"audio": np.zeros(16000, np.float32), "text": "go"}]
    trainer = ParakeetTrainer(
        model, training_arguments(tmp_path, 1), train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    (training_batch,) = list(trainer.get_train_dataloader())
    (evaluation_batch,) = list(trainer.get_eval_dataloader())
    assert training_batch["input_features"].std() > 0.5
    assert evaluation_batch["input_features"].std() == 0
    # the collator of the trainer is unchanged
    assert trainer.data_collator.dither == 1e-5


def test_counts_of_the_collator_are_logged(tmp_path, warnings):
    model, processor = create_model("ctc")
    rows = [{**row, "text": row["text"].upper()} for row in compute_features(ROWS, processor)]
    rows[0]["text"] = "go"
    trainer = ParakeetTrainer(model, training_arguments(tmp_path, 4), train_dataset=rows, processing_class=processor)
    trainer.train()
    assert len([text for text in warnings if "characters outside the vocabulary" in text]) == 1
    assert trainer.state.log_history[-1]["transcripts_with_unknown_characters"] == 19


# evaluation


def test_silence_replaces_a_broken_clip_in_evaluation(tmp_path, warnings):
    rows = [ROWS[0], {"audio": str(tmp_path / "missing.wav"), "text": "nothing"}, ROWS[1], ROWS[2]]
    _, processor = create_model("ctc")
    trainer = create_evaluating_trainer(tmp_path, rows, collator=SpeechCollator(processor, skip_broken=True))
    first, second = trainer.get_eval_dataloader()
    assert (len(first["labels"]), len(second["labels"])) == (3, 1)
    # a second of silence with an empty transcript
    assert first["attention_mask"].sum(-1)[1] == 100
    silence = SpeechCollator(processor, dither=0.0)([{"audio": np.zeros(16000, np.float32), "text": ""}])
    assert torch.equal(first["input_features"][1, :100], silence["input_features"][0])
    assert first["labels"][1].unique().tolist() == [-100]
    # the other clips are as without the broken one
    others = SpeechCollator(processor, dither=0.0)([rows[0], rows[2]])
    assert torch.equal(first["labels"][[0, 2], : others["labels"].shape[1]], others["labels"])
    num_frames = others["attention_mask"].sum(-1).max()
    assert torch.equal(first["input_features"][[0, 2], :num_frames], others["input_features"])
    assert len(trainer.predict(rows).label_ids) == 4
    # once by the loader above, once by `predict`
    assert trainer.data_collator.counts.as_dict() == {"broken_clips": 2}
    assert "replaced with one second of silence" in warnings[0]
    # training skips it
    assert len(trainer.data_collator(rows)["labels"]) == 3


@pytest.mark.parametrize(("head", "decoder"), [(head, None) for head in HEADS] + [("hybrid", "ctc")])
def test_metrics_get_the_tokens_of_the_pipeline(head, decoder, tmp_path):
    model, processor = create_model(head)
    generate_kwargs = {"decoder": decoder} if decoder else {}
    predictions = []

    def compute_metrics(prediction):
        """Keep the prediction and compute the error rates."""
        predictions.append(prediction)
        return ErrorRates(processor)(prediction)

    trainer = ParakeetTrainer(
        model,
        training_arguments(tmp_path, 1, per_device_eval_batch_size=3),
        eval_dataset=ROWS[:7],
        processing_class=processor,
        compute_metrics=compute_metrics,
        generate_kwargs=generate_kwargs,
    )
    scores = trainer.evaluate()
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
    )
    hypotheses = [pipe(row["audio"], generate_kwargs=generate_kwargs)["text"] for row in ROWS[:7]]
    references = [row["text"] for row in ROWS[:7]]
    rates = ErrorRates(processor)
    (prediction,) = predictions
    assert rates.decode(prediction.label_ids) == references
    assert [text.strip() for text in rates.decode(prediction.predictions)] == [text.strip() for text in hypotheses]
    assert any(hypotheses)
    assert scores["eval_wer"] == pytest.approx(error_rates(references, hypotheses)["wer"])
    assert np.asarray(prediction.predictions).ndim == 2


def test_tokens_of_ctc_frames_have_no_blanks_and_no_repetitions():
    frames = torch.tensor([[4, 1, 1, 4, 1, 2], [4, 4, 4, 4, 4, 4]])
    expected = [[1, 1, 2], [-100] * 3]
    assert extract_tokens(collapse_ctc(frames, blank_id=4)).tolist() == expected
    # a batch of silence has one column
    assert extract_tokens(collapse_ctc(frames[1:], blank_id=4)).tolist() == [[-100]]


def test_tokens_of_transducer_steps_have_no_blanks_and_keep_repetitions():
    steps = ClipSteps()
    for frame, token in enumerate([1, 1, 4, 2]):
        steps.append(token, frame, 1, is_forced_advance=False)
    hypotheses = collect_hypotheses([steps, ClipSteps()], 4, 0, torch.device("cpu"), False, False)
    assert extract_tokens(hypotheses).tolist() == [[1, 1, 2], [-100] * 3]


@pytest.mark.parametrize("head", ["ctc", "hybrid"])
def test_the_error_rate_does_not_depend_on_return_dict_in_generate(head, tmp_path):
    decoder = {"decoder": "ctc"} if head == "hybrid" else {}
    rates = []
    for return_dict in (False, True):
        options = {**decoder, "return_dict_in_generate": return_dict}
        trainer = create_evaluating_trainer(tmp_path, ROWS[:4], head, generate_kwargs=options)
        rates.append(trainer.evaluate()["eval_cer"])
    assert rates[0] == rates[1] > 0

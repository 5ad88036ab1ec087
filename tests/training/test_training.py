"""Training runs: schedules, accumulation, interruptions, precision, and that every kind of head learns."""

import jiwer
import numpy as np
import pytest
import torch
from training_helpers import (
    HEADS,
    compute_features,
    create_model,
    logged_losses,
    sentence_rows,
    training_arguments,
)
from transformers import Trainer, get_inverse_sqrt_schedule, pipeline

import transformers_parakeet as tp
from transformers_parakeet.training import ParakeetTrainer, SpeechCollator, freeze

ROWS = sentence_rows()


def test_nemos_noam_schedule_is_the_inverse_square_root_schedule():
    scale, width, warmup = 5.0, 256, 100
    peak = scale * (width * warmup) ** -0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup)
    for step in range(1, 1000):
        optimizer.step()
        schedule.step()
        noam = scale * width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule.get_last_lr()[0] == pytest.approx(noam, rel=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_the_trainer_of_transformers_needs_only_model_and_processor(head, tmp_path):
    model, processor = create_model(head)
    model.config.spec_augment = {"time_masks": 2, "time_width": 0.05, "freq_masks": 1, "freq_width": 10}

    def collate(rows):
        """Build a batch with the processor alone."""
        audio = [tp.load_audio(row["audio"]) for row in rows]
        return dict(processor(audio=audio, text=[row["text"] for row in rows], sampling_rate=16000))

    settings = training_arguments(tmp_path, 3, remove_unused_columns=False, prediction_loss_only=True)
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=ROWS, eval_dataset=ROWS[:4])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("head", HEADS)
def test_the_documented_training_step_gives_every_parameter_a_gradient(head):
    model, processor = create_model(head)
    inputs = processor(audio=[tp.load_audio(ROWS[0]["audio"])], text=[ROWS[0]["text"]], sampling_rate=16000)
    model(**inputs).loss.backward()
    without_gradient = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.abs().sum() > 0
    ]
    # the softmax cancels the bias of the keys
    assert [name for name in without_gradient if "k_proj.bias" not in name] == []


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """For reductions that average over clips; batch norms are frozen, because their statistics are those of a batch."""
    curves = []
    for batch_size, accumulation in ((10, 1), (5, 2)):
        model, processor = create_model("ctc", ctc_loss_reduction="mean_batch")
        freeze(model, ["encoder.layers.0.conv.norm", "encoder.layers.1.conv.norm"])
        settings = training_arguments(
            tmp_path, 4, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation
        )
        rows = compute_features(ROWS, processor)
        trainer = ParakeetTrainer(model, settings, train_dataset=rows, processing_class=processor)
        trainer.train()
        curves.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    # measured: 3e-6
    assert np.allclose(*curves, rtol=3e-5)
    assert curves[0][-1][0] < curves[0][0][0]


@pytest.mark.parametrize("by_duration", [False, True])
def test_a_resumed_run_gives_the_weights_of_an_uninterrupted_run(by_duration, tmp_path):
    """Bit for bit, with dropout, layer drop, SpecAugment, dither and a shuffled order, in the middle of an epoch."""
    import datasets

    spec_augment = {"time_masks": 2, "time_width": 10, "freq_masks": 1, "freq_width": 10}
    columns = ("audio", "text", "duration")
    data = datasets.Dataset.from_list([{name: row[name] for name in columns} for row in ROWS[:9]])

    def create_trainer(folder):
        """Return a trainer of six updates with a checkpoint after the third."""
        model, processor = create_model("tdt", encoder={"dropout": 0.1, "layerdrop": 0.2}, spec_augment=spec_augment)
        settings = training_arguments(folder, 6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3)
        return ParakeetTrainer(
            model,
            settings,
            train_dataset=data,
            processing_class=processor,
            batch_duration_s=5.0 if by_duration else None,
        )

    uninterrupted = create_trainer(tmp_path / "uninterrupted")
    uninterrupted.train()
    resumed = create_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-3"))
    resumed_weights = resumed.model.state_dict()
    for name, value in uninterrupted.model.state_dict().items():
        assert torch.equal(value, resumed_weights[name]), name
    losses = logged_losses(uninterrupted)
    assert losses == logged_losses(resumed)
    assert len(set(losses)) == 6


def test_gradient_checkpointing_gives_the_same_gradients():
    _, processor = create_model("ctc")
    batch = SpeechCollator(processor)(ROWS[:3])
    gradients = []
    for checkpointing in (False, True):
        model, _ = create_model("ctc", encoder={"dropout": 0.1, "activation_dropout": 0.1})
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(plain, checkpointed) for plain, checkpointed in zip(*gradients, strict=True))


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_losses_in_mixed_precision_follow_those_in_float32(head, tmp_path):
    curves = []
    for bf16 in (False, True):
        model, processor = create_model(head)
        rows = compute_features(ROWS[:10], processor)
        settings = training_arguments(tmp_path, 6, bf16=bf16)
        trainer = ParakeetTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=processor)
        trainer.train()
        curves.append(logged_losses(trainer))
        assert trainer.evaluate()["eval_loss"] < curves[-1][0]
    # measured: 0.11 %
    assert np.allclose(*curves, rtol=0.005)


@pytest.mark.parametrize(
    ("head", "steps"),
    [
        ("ctc", 240),
        pytest.param("rnnt", 600, marks=pytest.mark.slow),
        pytest.param("tdt", 300, marks=pytest.mark.slow),
        pytest.param("hybrid", 400, marks=pytest.mark.slow),
    ],
)
def test_twenty_sentences_are_learnt_by_heart(head, steps, tmp_path):
    model, processor = create_model(head, 64)
    rows = compute_features(ROWS, processor)
    settings = training_arguments(
        tmp_path, steps, learning_rate=3e-3, warmup_steps=20, lr_scheduler_type="cosine", logging_steps=100
    )
    trainer = ParakeetTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    assert trainer.evaluate()["eval_wer"] == 0
    trainer.save_model()
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path))
    references = [row["text"] for row in ROWS]
    hypotheses = [pipe(row["audio"])["text"] for row in ROWS]
    assert jiwer.wer(references, hypotheses) == 0
    if head == "hybrid":
        hypotheses = [pipe(row["audio"], generate_kwargs={"decoder": "ctc"})["text"] for row in ROWS]
        assert jiwer.wer(references, hypotheses) < 0.1

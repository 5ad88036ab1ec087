"""The guard against updates whose gradients are not finite, and the state that a skipped update leaves."""

import math

import pytest
import torch
from training_helpers import compute_features, create_model, record_warnings, sentence_rows, training_arguments
from transformers import TrainerCallback

from transformers_parakeet.training import NonFiniteGuard, ParakeetTrainer

ROWS = sentence_rows()


class NaNGradients(TrainerCallback):
    """Makes a gradient of some updates NaN.

    Args:
        updates: numbers of the updates, from 0.
    """

    def __init__(self, updates):
        self.updates = updates

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        """Change a gradient before the guard checks it."""
        if state.global_step in self.updates:
            next(model.parameters()).grad[0] = float("nan")


class WeightRecorder(TrainerCallback):
    """Copies the parameters of the model after every update."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model, **kwargs):
        """Append a copy of all parameters, by name."""
        self.weights.append({name: value.clone() for name, value in model.named_parameters()})

    def changed_between(self, first, second):
        """Return whether any parameter differs after two updates."""
        before, after = self.weights[first], self.weights[second]
        return not all(torch.equal(before[name], after[name]) for name in before)


def copy_buffers(model):
    """Return copies of all buffers of a model, by name."""
    return {name: value.clone() for name, value in model.named_buffers()}


def test_an_update_whose_gradients_are_not_finite_is_skipped(tmp_path, monkeypatch):
    warnings = record_warnings(monkeypatch, "update_guard")
    model, processor = create_model("ctc")
    recorder = WeightRecorder()
    trainer = ParakeetTrainer(
        model,
        training_arguments(tmp_path, 4),
        train_dataset=compute_features(ROWS, processor),
        processing_class=processor,
        callbacks=[NaNGradients({1, 2}), recorder],
    )
    trainer.train()
    assert [recorder.changed_between(index, index + 1) for index in range(3)] == [False, False, True]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert trainer.guard.num_skipped_updates == 2
    assert trainer.state.log_history[-1]["skipped_updates"] == 2
    assert warnings == [f"Update {number} is skipped: its gradients are not finite." for number in (2, 3)]


def test_twenty_consecutive_skipped_updates_end_the_training(tmp_path):
    model, processor = create_model("ctc")
    trainer = ParakeetTrainer(
        model,
        training_arguments(tmp_path, 60, learning_rate=0.0),
        train_dataset=compute_features(ROWS, processor),
        processing_class=processor,
        callbacks=[NaNGradients(range(2, 60))],
    )
    with pytest.raises(FloatingPointError, match="20 consecutive updates"):
        trainer.train()
    assert trainer.guard.num_skipped_updates == 20


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_update_restores_the_statistics_of_batch_norms(accumulation, tmp_path):
    model, processor = create_model("ctc")
    rows = compute_features(ROWS, processor)
    bad_row = {**rows[0], "input_features": torch.full((100, 80), math.nan)}
    trainer = ParakeetTrainer(
        model,
        training_arguments(tmp_path, 1, per_device_train_batch_size=3, gradient_accumulation_steps=accumulation),
        train_dataset=[bad_row, *rows[: 3 * accumulation - 1]],
        eval_dataset=rows[:5],
        processing_class=processor,
    )
    before = copy_buffers(model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.guard.num_skipped_updates == 1
    after = copy_buffers(model)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert trainer.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize("is_finite", [True, False])
def test_with_float16_the_guard_only_restores_statistics_that_are_not_finite(is_finite, tmp_path):
    """The gradient scaler skips updates itself: it finds its scale by letting gradients overflow."""
    model, _ = create_model("ctc")
    guard, settings = NonFiniteGuard(), training_arguments(tmp_path, 1)
    settings.fp16 = True
    guard.on_step_begin(settings, None, None, model=model)
    norm = model.encoder.layers[0].conv.norm
    norm.running_var.fill_(3.0 if is_finite else math.inf)
    norm.running_mean.fill_(2.0)
    guard.on_pre_optimizer_step(settings, None, None, model=model)
    assert guard.num_skipped_updates == 0
    assert norm.running_var.tolist() == [3.0 if is_finite else 1.0] * 32
    assert norm.running_mean.tolist() == [2.0 if is_finite else 0.0] * 32


def test_updates_with_finite_gradients_keep_their_statistics(tmp_path):
    model, processor = create_model("ctc")
    trainer = ParakeetTrainer(
        model,
        training_arguments(tmp_path, 3, per_device_train_batch_size=2),
        train_dataset=compute_features(ROWS[:6], processor),
        processing_class=processor,
    )
    trainer.train()
    assert {int(value) for name, value in model.named_buffers() if "num_batches" in name} == {3}

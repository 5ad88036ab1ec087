"""The guard against updates that are not finite, and what such an update leaves behind."""

import math

import pytest
import torch
from training_helpers import arguments, features_of, sentence_rows, small

from transformers_parakeet.training.trainer import NonFiniteGuard, ParakeetTrainer

ROWS = sentence_rows()


def statistics(model):
    """Copies of all buffers of the model, by name."""
    return {name: value.clone() for name, value in model.named_buffers()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_skipped_update_leaves_the_statistics_of_batch_norms_alone(accumulation, tmp_path):
    model, processor = small("ctc")
    rows = features_of(ROWS, processor)
    bad = {**rows[0], "input_features": torch.full((100, 80), math.nan)}
    trainer = ParakeetTrainer(
        model,
        arguments(tmp_path, 1, per_device_train_batch_size=3, gradient_accumulation_steps=accumulation),
        train_dataset=[bad, *rows[: 3 * accumulation - 1]],
        eval_dataset=rows[:5],
        processing_class=processor,
    )
    before = statistics(model)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.guard.skipped == 1
    after = statistics(model)
    assert [name for name in before if not torch.equal(after[name], before[name])] == []
    assert trainer.evaluate()["eval_loss"] == loss


@pytest.mark.parametrize("poisoned", [True, False])
def test_the_scaler_of_half_precision_skips_updates_without_the_guard(poisoned, tmp_path):
    """It changes its scale by overflowing gradients: only statistics that are not finite are replaced."""
    model, _ = small("ctc")
    guard, settings = NonFiniteGuard(), arguments(tmp_path, 1)
    settings.fp16 = True
    guard.on_step_begin(settings, None, None, model=model)
    norm = model.encoder.layers[0].conv.norm
    norm.running_var.fill_(math.inf if poisoned else 3.0)
    norm.running_mean.fill_(2.0)
    guard.on_pre_optimizer_step(settings, None, None, model=model)
    assert guard.skipped == 0
    assert norm.running_var.tolist() == [1.0 if poisoned else 3.0] * 32
    assert norm.running_mean.tolist() == [0.0 if poisoned else 2.0] * 32


def test_statistics_of_good_updates_are_kept(tmp_path):
    model, processor = small("ctc")
    rows = features_of(ROWS[:6], processor)
    trainer = ParakeetTrainer(
        model, arguments(tmp_path, 3, per_device_train_batch_size=2), train_dataset=rows, processing_class=processor
    )
    trainer.train()
    assert {int(value) for name, value in model.named_buffers() if "num_batches" in name} == {3}

"""Lines about the progress of a training run."""

from types import SimpleNamespace

import pytest

from transformers_parakeet.training import progress


def make_state(step, max_steps=40, is_first=True):
    """Create a `TrainerState` with the attributes that the reporter reads."""
    return SimpleNamespace(global_step=step, max_steps=max_steps, epoch=step / 10, is_world_process_zero=is_first)


def test_lines_name_loss_rates_and_remaining_time(monkeypatch):
    lines, clock = [], iter([100.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    reporter = progress.ProgressReporter(lines.append)
    # a resumed run: the ten updates before do not count for the speed
    reporter.on_train_begin(None, make_state(10), None)
    # ten updates in 30 s, twenty are left
    reporter.on_log(
        None, make_state(20), None, {"loss": 2.34567, "grad_norm": 3.0, "learning_rate": 1e-4, "epoch": 2.0}
    )
    rates = {"eval_loss": 1.5, "eval_wer": 0.1234, "eval_cer": 0.05, "eval_runtime": 3.0, "eval_steps_per_second": 9.0}
    reporter.on_log(None, make_state(40), None, rates)
    assert lines == [
        "step 20 of 40, epoch 2.00, about 60 s left: loss 2.3457, learning rate 1.0e-04",
        "step 40 of 40, epoch 4.00: evaluation loss 1.5000, word error rate 12.34%, character error rate 5.00%",
    ]


def test_other_processes_and_entries_without_values_report_nothing():
    lines = []
    reporter = progress.ProgressReporter(lines.append)
    reporter.on_train_begin(None, make_state(0), None)
    reporter.on_log(None, make_state(40, is_first=False), None, {"loss": 1.0})
    reporter.on_log(None, make_state(40), None, {"epoch": 4.0, "grad_norm": 1.0})
    reporter.on_log(None, make_state(40), None, None)
    assert lines == []


@pytest.mark.parametrize(("seconds", "expected"), [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5400, "1.5 h")])
def test_durations(seconds, expected):
    assert progress.format_duration(seconds) == expected

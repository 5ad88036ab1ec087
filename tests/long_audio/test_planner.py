"""Checks the choice between whole and windows at planted budgets, and what is read as free memory."""

import pytest
import torch

import transformers_parakeet as tp
from transformers_parakeet.long_audio import Plan, estimate_peak_memory, find_max_samples, plan_recording
from transformers_parakeet.long_audio.planner import (
    get_free_memory,
    get_memory_budget,
    read_group_memory,
    read_machine_memory,
    read_system_memory,
)

RATE = 16000
HOUR = 3600 * RATE


def config_110m(**changes):
    """Return the configuration of a CTC model of 110 million parameters."""
    encoder = {
        "hidden_size": 512,
        "num_hidden_layers": 17,
        "num_attention_heads": 8,
        "intermediate_size": 2048,
        **changes,
    }
    return tp.ParakeetCTCConfig(vocab_size=1025, encoder_config=encoder)


@pytest.mark.parametrize("budget", [1, 4 * 10**8, 10**9, 3 * 10**9, 10**11])
@pytest.mark.parametrize("batch_size", [1, 8])
def test_the_longest_recording_just_fits_the_budget(budget, batch_size):
    config = config_110m()
    longest = find_max_samples(config, budget, batch_size)
    assert longest == 0 or estimate_peak_memory(config, longest, batch_size) <= budget
    assert estimate_peak_memory(config, longest + 1, batch_size) > budget


def test_the_estimate_grows_linearly_with_length_and_batch():
    config = config_110m()
    one, two, four = (estimate_peak_memory(config, hours * HOUR) for hours in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
    batches = [estimate_peak_memory(config, HOUR, batch) for batch in (1, 2, 3)]
    assert batches[2] - batches[1] == batches[1] - batches[0] > 0
    assert estimate_peak_memory(config, HOUR, dtype_bytes=2) < one


def test_an_attention_context_that_is_limited_on_both_sides_needs_less():
    full = estimate_peak_memory(config_110m(), HOUR)
    local = estimate_peak_memory(config_110m(attention_context_size=[128, 128]), HOUR)
    assert local < full
    # a context that is limited on one side has the positions of full attention
    assert estimate_peak_memory(config_110m(attention_context_size=[128, -1]), HOUR) == full


@pytest.mark.parametrize(
    ("num_samples", "max_samples", "window_s", "has_full_attention", "expected"),
    [
        (HOUR, HOUR, None, False, ("whole", None)),
        (HOUR, HOUR - 1, None, False, ("windows", 60.0)),
        (24 * 60 * RATE, HOUR, None, True, ("whole", None)),
        (24 * 60 * RATE + 1, HOUR, None, True, ("windows", 60.0)),
        (HOUR, HOUR, 0, True, ("whole", None)),
        # a recording that is not longer than a window is never cut
        (60 * RATE, 0, None, True, ("whole", None)),
        (60 * RATE + 1, 0, None, True, ("windows", 60.0)),
        (10 * HOUR, 0, 0, False, ("whole", None)),
        (10 * RATE, 0, 10.0, True, ("whole", None)),
        (10 * RATE + 1, HOUR, 10.0, False, ("windows", 10.0)),
    ],
)
def test_plans_at_planted_limits(num_samples, max_samples, window_s, has_full_attention, expected):
    plan = plan_recording(num_samples, max_samples, window_s, RATE, 10**9, has_full_attention)
    assert isinstance(plan, Plan)
    assert (plan.mode, plan.window_s) == expected
    assert plan.reason


@pytest.mark.parametrize("budget", [0, -1, 1.5, "2GB", True])
def test_budgets_that_are_not_bytes_are_refused(budget):
    with pytest.raises(ValueError, match="memory_budget"):
        get_memory_budget(budget, torch.device("cpu"))


def test_the_default_budget_is_a_quarter_of_the_free_memory_and_at_least_one_gigabyte(monkeypatch):
    device = torch.device("cpu")
    assert get_memory_budget(12345, device) == 12345
    for free, expected in ((40 * 10**9, 10 * 10**9), (10**9, 10**9), (0, 10**9)):
        monkeypatch.setattr("transformers_parakeet.long_audio.planner.get_free_memory", lambda _, free=free: free)
        assert get_memory_budget(None, device) == expected


def test_free_memory_of_the_machine(tmp_path):
    path = tmp_path / "meminfo"
    assert read_machine_memory(path) == float("inf")
    path.write_text("MemTotal:       100 kB\nMemAvailable:    64 kB\n")
    assert read_machine_memory(path) == 64 * 1024
    assert get_free_memory(torch.device("cpu")) > 0
    assert read_system_memory() > 0


def test_free_memory_of_a_control_group(tmp_path):
    assert read_group_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert read_group_memory(tmp_path) == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert read_group_memory(tmp_path) == 300
    # cached files can be removed from memory
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200\nactive_file 5\n")
    assert read_group_memory(tmp_path) == 500
    old = tmp_path / "version1"
    (old / "memory").mkdir(parents=True)
    (old / "memory" / "memory.limit_in_bytes").write_text("1000\n")
    (old / "memory" / "memory.usage_in_bytes").write_text("400\n")
    (old / "memory" / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 50\n")
    assert read_group_memory(old) == 650

"""Tests of the benchmark from samples to text: its tables, and a run with a tiny model."""

import csv
import importlib
import subprocess
import sys

import pytest
from conftest import TESTS

BENCHMARKS = TESTS.parent / "benchmarks"


@pytest.fixture
def tables(monkeypatch):
    """The script that makes the tables."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("end_to_end_tables")


def read_rows(path):
    """Read a CSV file as dicts."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_results(path):
    """Write the results of two sides: three runs of one case, and one run of another case for the first side."""
    constants = {"date": "2026-11-30 10:00", "machine": "Some CPU, x86_64", "instructions": "avx2", "cores": 2}
    constants |= {"threads": 1, "python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "shape": "110M"}
    rows = []
    for engine, case, whole, peak in [
        ("stock", "10 s", 2.0, 900),
        ("stock", "10 s", 6.0, 950),
        ("stock", "10 s", 3.0, 900),
        ("ours", "10 s", 1.0, 700),
        ("ours", "10 s", 1.5, 700),
        ("ours", "10 s", 1.25, 700),
        ("ours", "60 s", 9.0, 800),
    ]:
        side = {"engine": engine, "engine_version": "1.0", "dtype": "float32", "loading_s": 4, "loading_peak_mib": 850}
        stages = {"features_s": 0.1, "encoder_s": whole / 2, "decoding_s": 0.2, "text_s": 0.0, "whole_s": whole}
        rows.append(
            {**constants, **side, "case": case, "peak_mib": peak, "labels": 35, "token_error_rate": 0.02, **stages}
        )
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def test_tables_contain_medians_fastest_runs_and_ratios_of_medians(tables, tmp_path):
    write_results(tmp_path / "results.csv")
    lines = tables.render(tmp_path / "results.csv").splitlines()
    assert lines[0] == "2026-11-30, Some CPU, x86_64 (avx2), 2 cores, 1 threads"
    # the peak of loading counts, too
    assert "| stock float32 | 3.000 (2.000) |  | 4.0 | 950 |" in lines
    assert "| ours float32 | 1.250 (1.000) | 9.000 (9.000) | 4.0 | 850 |" in lines
    assert "| ours float32 against stock float32 | 2.40 |  |" in lines
    assert "| 10 s | ours float32 | 0.100 | 0.625 | 0.200 | 0.000 | 1.250 | 35 | 2.0% |" in lines
    # no pair of sides of int8 was measured
    assert not any("int8" in line for line in lines)


def test_a_side_that_is_not_available_is_refused(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--sides", "nemo-float32"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 1
    assert "got nemo-float32: correct them" in result.stderr


@pytest.mark.slow
def test_a_run_with_a_tiny_model(tmp_path):
    results = tmp_path / "results.csv"
    command = [sys.executable, str(BENCHMARKS / "end_to_end.py"), "--shapes", "tiny", "--rounds", "1", "--threads", "1"]
    command += ["--sides", "stock-float32", "ours-float32", "ours-bfloat16", "--cases", "10 s", "8 x 15 s"]
    command += ["--cache", str(tmp_path / "cache"), "--csv", str(results)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = read_rows(results)
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        parts = [float(row[f"{stage}_s"]) for stage in ("features", "encoder", "decoding", "text")]
        assert min(parts[:3]) > 0
        # the stages are parts of the run; numbers are rounded to 0.1 ms
        assert sum(parts) <= float(row["whole_s"]) + 0.001
        # 3.5 labels per second; in bfloat16, rounding changes which labels a model with random weights emits
        seconds = {"10 s": 10, "8 x 15 s": 120}[row["case"]]
        lowest, highest = (2.5, 4.5) if row["dtype"] == "float32" else (1.5, 5.5)
        assert lowest * seconds < int(row["labels"]) < highest * seconds
        assert float(row["peak_mib"]) > 200
        if row["engine"] == "ours" and row["dtype"] == "float32":
            assert float(row["token_error_rate"]) == 0
    assert "| ours float32 against stock float32 | " in printed

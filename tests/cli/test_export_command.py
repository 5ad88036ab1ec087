"""Tests of `parakeet export`."""

import importlib.util

import onnx_asr
from conftest import ctc_model, noise
from typer.testing import CliRunner

from transformers_parakeet_cli.app import app


def run_export(*arguments):
    """Run `parakeet export` in this process and return its result."""
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


def test_the_folder_and_the_next_command(tmp_path):
    model, processor = ctc_model(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    folder = tmp_path / "exported"
    result = run_export(tmp_path / "model", folder, "--format", "onnx-asr")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split() == [str(folder / name) for name in ("config.json", "model.onnx", "vocab.txt")]
    assert "onnx-asr recognises the same tokens in 8 of 8 bundled clips" in result.stderr
    assert result.stderr.endswith(f"next: onnx-asr nemo-conformer-ctc FILE.wav -p {folder}\n")
    clip = noise(2.0)
    inputs = processor(clip, sampling_rate=16000)
    text = processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    recognised = onnx_asr.load_model("nemo-conformer-ctc", folder).recognize(clip)
    # onnx-asr omits spaces before all punctuation, and this package only before the punctuation that can end a word
    assert recognised.replace(" ", "") == text.replace(" ", "") != ""


def test_what_cannot_be_exported_is_one_line(golden, tmp_path):
    streaming = golden / "real_configs" / "nemotron" / "model.nemo"
    result = run_export(streaming, tmp_path / "exported")
    assert result.exit_code == 1
    assert "onnx-asr cannot run this model: its attention context is limited to [70, 13] frames" in result.stderr
    assert not (tmp_path / "exported").exists()


def test_without_onnx_asr_the_tokens_are_not_compared(tmp_path, monkeypatch):
    from transformers_parakeet_cli import export

    messages = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(export, "print_note", messages.append)
    export.compare_tokens(None, tmp_path, {})
    assert messages == ["tokens were not compared, because onnx-asr is not installed: pip install 'onnx-asr[cpu]'"]

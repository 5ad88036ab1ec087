"""Tests of the options and the output of `parakeet evaluate`."""

import json
import re

import jiwer
import pytest
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet.networks import has_int8_products
from transformers_parakeet.transcription import load_pipeline
from transformers_parakeet_cli.app import app

CLIPS = tp.demo_model_path() / "clips"


def run_evaluate(*arguments):
    """Run `parakeet evaluate` with the demo model in this process and return its result."""
    return CliRunner().invoke(app, ["evaluate", "demo", *map(str, arguments), "--device", "cpu", "--dtype", "float32"])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """A manifest of three demo clips whose transcripts start with a capital letter."""
    path = tmp_path_factory.mktemp("manifest") / "manifest.jsonl"
    clips = json.loads((CLIPS / "manifest.json").read_text(encoding="utf-8"))[:3]
    lines = [{"audio_filepath": str(CLIPS / clip["file"]), "text": clip["text"].capitalize()} for clip in clips]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_clips(path):
    """Return the references and the hypotheses in a file that `--output` wrote."""
    clips = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [clip["reference"] for clip in clips], [clip["hypothesis"] for clip in clips]


def test_rates_of_each_normalisation(manifest, tmp_path):
    output = tmp_path / "clips.jsonl"
    result = run_evaluate(manifest, "--normalize", "none", "--output", output)
    assert result.exit_code == 0, result.stderr
    references, hypotheses = read_clips(output)
    counts = jiwer.process_words(references, hypotheses)
    # each capital letter is an error
    assert counts.substitutions >= 3
    num_words = sum(len(reference.split()) for reference in references)
    expected = {
        "word error rate": counts.wer,
        "substitutions": counts.substitutions / num_words,
        "deletions": counts.deletions / num_words,
        "insertions": counts.insertions / num_words,
        "character error rate": jiwer.cer(references, hypotheses),
    }
    for name, rate in expected.items():
        match = re.search(
            rf"^ *{name} +([\d.]+)% \(95 % interval ([\d.]+)% to ([\d.]+)%\)$", result.stdout, re.MULTILINE
        )
        value, low, high = map(float, match.groups())
        assert value == pytest.approx(100 * rate, abs=0.006)
        assert low <= value <= high
    assert re.search(r"^data +3 clips, \d+ s$", result.stdout, re.MULTILINE)
    for normalization in ("basic", "english"):
        normalized = run_evaluate(manifest, "--normalize", normalization)
        rate = float(re.search(r"word error rate +([\d.]+)%", normalized.stdout)[1])
        lower = [text.lower() for text in references]
        assert rate == pytest.approx(100 * jiwer.wer(lower, hypotheses), abs=0.006)


def test_the_report_is_written_and_named(manifest, tmp_path):
    report = tmp_path / "report.html"
    result = run_evaluate(manifest, "--report", report, "--decoder", "ctc", "--batch-size", 2)
    assert result.exit_code == 0, result.stderr
    page = report.read_text(encoding="utf-8")
    assert str(manifest) in page
    assert "ctc" in page
    assert f"wrote {report}" in result.stderr


@pytest.mark.parametrize("option", ["--report", "--output"])
def test_a_file_that_cannot_be_written_does_not_lose_the_rates(option, manifest, tmp_path):
    result = run_evaluate(manifest, option, tmp_path / "missing" / "file")
    assert result.exit_code == 1
    assert re.search(r"^word error rate +[\d.]+% \(", result.stdout, re.MULTILINE)
    assert str(tmp_path / "missing" / "file") in result.stderr.splitlines()[-1]


def test_spellings_need_the_english_normalisation(manifest, tmp_path):
    result = run_evaluate(manifest, "--spellings", tmp_path / "normalizer.json")
    assert result.exit_code == 1
    assert "`--spellings` must come with `--normalize english`, got 'basic'" in result.stderr
    spellings = tmp_path / "normalizer.json"
    spellings.write_text('["colour"]')
    result = run_evaluate(manifest, "--normalize", "english", "--spellings", spellings)
    assert result.exit_code == 1
    assert "the list of spellings must be a JSON object" in result.stderr


ARPA = "\\data\\\nngram 1=4\n\n\\1-grams:\n-99\t<s>\n-1.0\t</s>\n-0.1\tnine\n-3.0\t<unk>\n\n\\end\\\n"


@pytest.mark.parametrize("search", [{"num_beams": 3}, {"boost": ["nine"]}, {"language_model": ARPA, "num_beams": 2}])
def test_the_search_is_that_of_the_pipeline(search, manifest, tmp_path, monkeypatch):
    calls = []
    call = tp.ParakeetASRPipeline.__call__
    monkeypatch.setattr(
        tp.ParakeetASRPipeline,
        "__call__",
        lambda self, *args, **kwargs: (calls.append(kwargs), call(self, *args, **kwargs))[1],
    )
    output, phrases, arpa = tmp_path / "clips.jsonl", tmp_path / "phrases.txt", tmp_path / "words.arpa"
    phrases.write_text("nine\n", encoding="utf-8")
    arpa.write_text(ARPA, encoding="utf-8")
    arguments, options = dict(search), []
    if "num_beams" in search:
        options += ["--beams", search["num_beams"]]
    if "boost" in search:
        options += ["--boost", phrases]
    if "language_model" in search:
        options += ["--lm", arpa, "--lm-weight", 3]
        arguments |= {"language_model": str(arpa), "lm_weight": 3.0}
    result = run_evaluate(manifest, "--output", output, *options)
    assert result.exit_code == 0, result.stderr
    assert {name: calls[0][name] for name in arguments} == arguments
    pipeline = load_pipeline("demo", device="cpu", dtype="float32")
    audio = [json.loads(line)["audio_filepath"] for line in manifest.read_text().splitlines()]
    expected = [entry["text"] for entry in pipeline(audio, **arguments)]
    assert read_clips(output)[1] == expected
    if "language_model" in search:
        assert expected != [entry["text"] for entry in pipeline(audio)]


def test_int8_is_in_the_report(manifest, tmp_path):
    report = tmp_path / "report.html"
    result = run_evaluate(manifest, "--quantize", "int8", "--report", report)
    assert result.exit_code == 0, result.stderr
    assert "int8" in report.read_text(encoding="utf-8")
    assert ("in int8 and float32" in result.stderr) == has_int8_products()

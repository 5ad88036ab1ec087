"""Tests of `parakeet transcribe` on the bundled recordings and the demo model."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from conftest import run_program
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import subtitles, transcription
from transformers_parakeet_cli import transcribe
from transformers_parakeet_cli.app import app
from transformers_parakeet_cli.outputs import FORMAT_NAMES

CLIPS = tp.demo_model_path() / "clips"
MANIFEST = json.loads((CLIPS / "manifest.json").read_text(encoding="utf-8"))
TEXTS = {clip["file"]: clip["text"] for clip in MANIFEST}
FIRST = CLIPS / MANIFEST[0]["file"]
DIGITS = CLIPS / "one_two_three.flac"
# the demo model; float32, because the default dtype depends on the processor
OPTIONS = ("--model", "demo", "--dtype", "float32")


def run(*arguments, options=(*OPTIONS, "--quiet"), **settings):
    """Run `parakeet transcribe` in this process and return its result: exit code, stdout and stderr.

    Args:
        *arguments: inputs and options.
        options: options that are added.
        **settings: arguments of `CliRunner.invoke`.
    """
    arguments = ["transcribe", *map(str, arguments), *map(str, options)]
    return CliRunner().invoke(app, arguments, **{"env": {"COLUMNS": "200"}, **settings})


def read_files(folder):
    """Return the content of every file in a folder and its sub-folders, by path relative to the folder."""
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in folder.rglob("*.*")}


def copy_clips(folder, number):
    """Copy clips of the demo to `clip0.flac`, `clip1.flac`, …; return what the demo model recognises of each."""
    recognised = [line.split(": ", 1)[1] for line in run(CLIPS).stdout.splitlines()]
    sources = sorted(CLIPS.glob("*.flac"))
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        shutil.copy(sources[index % len(sources)], folder / f"clip{index}.flac")
    return {f"clip{index}": recognised[index % len(sources)] for index in range(number)}


def test_a_folder_is_transcribed_in_the_order_of_the_names():
    result = run(CLIPS)
    assert result.exit_code == 0
    files, texts = zip(*(line.split(": ") for line in result.stdout.splitlines()), strict=True)
    assert [Path(file).name for file in files] == sorted(TEXTS)
    # one of the 26 words is wrong
    references = [TEXTS[name] for name in sorted(TEXTS)]
    assert jiwer.wer(references, list(texts)) == pytest.approx(1 / 26)


def test_the_text_of_one_file_is_printed_without_its_name():
    assert run(DIGITS).stdout == "one two three\n"
    lines = "[0.08 - 0.48] one\n[1.04 - 1.52] two\n[2.16 - 2.56] three\n"
    assert run(DIGITS, "--timestamps", "word").stdout == lines
    assert run(DIGITS, "--timestamps", "segment").stdout == "[0.08 - 2.56] one two three\n"


def test_json_contains_the_times_and_confidences_of_words():
    (entry,) = json.loads(run(DIGITS, "--format", "json").stdout)
    assert entry["text"] == "one two three"
    assert [word["text"] for word in entry["words"]] == ["one", "two", "three"]
    times = [(word["start"], word["end"]) for word in entry["words"]]
    assert times == [(0.08, 0.48), (1.04, 1.52), (2.16, 2.56)]
    # confidences of the pipeline
    pipeline_chunks = load_demo()(str(DIGITS), return_timestamps="word", return_confidence=True)["chunks"]
    expected = [chunk["confidence"] for chunk in pipeline_chunks]
    assert [word["confidence"] for word in entry["words"]] == pytest.approx(expected, abs=1e-6)
    assert entry["duration"] == pytest.approx(soundfile.info(DIGITS).duration)
    assert (entry["model"], entry["settings"]["dtype"]) == ("demo", "float32")


def load_demo():
    """Create a pipeline with the demo model."""
    model, processor = tp.load_nemo(tp.demo_model_path())
    return tp.ParakeetASRPipeline(model, processor=processor, task="automatic-speech-recognition")


def test_json_lines_are_one_object_per_result():
    result = run(FIRST, DIGITS, "--jsonl")
    entries = [json.loads(line) for line in result.stdout.splitlines()]
    assert [entry["file"] for entry in entries] == [str(FIRST), str(DIGITS)]
    assert entries[1]["text"] == "one two three"


def test_standard_input_is_transcribed():
    content = DIGITS.read_bytes()
    assert run("-", input=content).stdout == "one two three\n"
    result = run("-", FIRST, input=content)
    assert result.stdout.splitlines()[0] == "standard input: one two three"


def test_a_pattern_and_a_file_that_it_matches_are_one_recording():
    result = run(CLIPS / "fsdd_dev_*.flac", CLIPS / "fsdd_dev_0_yweweler.flac")
    assert [Path(line.split(":")[0]).name for line in result.stdout.splitlines()] == [
        "fsdd_dev_0_yweweler.flac",
        "fsdd_dev_1_nicolas.flac",
        "fsdd_dev_2_george.flac",
    ]


def test_names_without_a_recording_are_errors(tmp_path):
    result = run(tmp_path, tmp_path / "*.wav", tmp_path / "missing.wav", DIGITS)
    assert result.exit_code == 1
    assert result.stdout.strip().endswith("one two three")
    first, second, third = result.stderr.splitlines()
    assert "must contain an audio or video file" in first
    assert "must match a file" in second
    assert "missing.wav" in third


def test_forty_files_of_which_five_are_broken(tmp_path):
    texts = copy_clips(tmp_path / "in", 40)
    for index in range(3, 40, 8):
        (tmp_path / "in" / f"clip{index}.flac").write_bytes(b"no audio " * 50)
    broken = {f"clip{index}" for index in range(3, 40, 8)}
    output = tmp_path / "out"
    arguments = [tmp_path / "in", "--output-dir", output, "--format", "txt", "--format", "srt"]
    result = run(*arguments, options=OPTIONS)
    assert result.exit_code == 1
    assert result.stdout == ""
    *errors, summary, failures = result.stderr.splitlines()[-7:]
    assert {name for name in texts for line in errors if f"{name}.flac" in line} == broken
    expected = {f"{name}.txt": f"{text}\n" for name, text in texts.items() if name not in broken}
    files = read_files(output)
    assert {name: text for name, text in files.items() if name.endswith(".txt")} == expected
    assert len(files) == 70
    assert files["clip6.srt"] == "1\n00:00:00,080 --> 00:00:02,560\none two three\n"
    assert summary.startswith("35 files transcribed, ")
    assert failures.startswith("5 files failed: ")
    assert {name for name in texts if f"/{name}.flac" in failures} == broken

    # the second run writes what is missing
    (output / "clip0.txt").unlink()
    (output / "clip1.txt").write_text("an existing file")
    (output / "clip2.srt").unlink()
    (output / ".clip3.txt.17.partial").write_text("left by a process that was killed")
    shutil.copy(DIGITS, tmp_path / "in" / "clip3.flac")
    result = run(*arguments, options=OPTIONS)
    assert result.exit_code == 1
    assert "33 files skipped, because the output exists" in result.stderr
    assert "3 files transcribed" in result.stderr
    assert "4 files failed: " in result.stderr
    expected |= {"clip3.txt": "one two three\n", "clip1.txt": "an existing file"}
    files = read_files(output)
    assert {name: text for name, text in files.items() if name.endswith(".txt")} == expected
    assert run(tmp_path / "in" / "clip1.flac", "--output-dir", output, "--overwrite").exit_code == 0
    assert (output / "clip1.txt").read_text() == texts["clip1"] + "\n"


def test_files_of_the_same_name_have_different_outputs(tmp_path):
    for name in ("talk.flac", "a/talk.flac", "b/talk.flac"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DIGITS, tmp_path / "in" / name)
    samples, rate = soundfile.read(FIRST)
    soundfile.write(tmp_path / "in" / "talk.wav", samples, rate)
    assert run(tmp_path / "in", "--output-dir", tmp_path / "out").exit_code == 0
    digits, first = "one two three\n", run(FIRST).stdout
    assert read_files(tmp_path / "out") == {
        "talk.flac.txt": digits,
        "talk.wav.txt": first,
        "a/talk.txt": digits,
        "b/talk.txt": digits,
    }


def test_all_formats_are_written(tmp_path):
    assert run(DIGITS, "--format", "all", "--timestamps", "word", "--output-dir", tmp_path).exit_code == 0
    files = read_files(tmp_path)
    assert sorted(files) == [f"one_two_three.{name}" for name in ("json", "srt", "textgrid", "tsv", "txt", "vtt")]
    assert files["one_two_three.tsv"] == "start\tend\ttext\n80\t480\tone\n1040\t1520\ttwo\n2160\t2560\tthree\n"
    assert "one <00:00:01.040>two <00:00:02.160>three" in files["one_two_three.vtt"]
    assert json.loads(files["one_two_three.json"])["text"] == "one two three"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "srt", "--format", "txt"], "stdout holds one format, got txt, srt: add `--output-dir FOLDER`"),
        (["--jsonl", "--format", "txt"], "`--jsonl` prints to stdout, got also txt"),
        (["--format", "srt", FIRST], "stdout holds one file in the format srt, got 2 recordings"),
        (["--batch-size", "0"], "`batch_size` must be at least 1, got 0"),
        (["--chunk-length", "-1"], "`chunk_length_s` must not be negative, got -1.0"),
    ],
)
def test_an_invalid_combination_of_options_is_refused(options, message):
    result = run(DIGITS, *options)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert message in line


def test_options_reach_the_model(golden):
    nemo = golden / "hybrid_tdt_ctc" / "model.nemo"
    clip = golden / "clips" / "speech0.wav"
    names = ("transducer", "ctc")
    options = ("--model", nemo, "--attention", "local", "--dtype", "bfloat16", "--device", "cpu", "--jsonl")
    entries = [json.loads(run(clip, "--decoder", name, options=options).stdout) for name in names]
    assert entries[0]["text"] != entries[1]["text"]
    settings = entries[1]["settings"]
    assert settings["decoder"] == "ctc"
    assert settings["dtype"] == "bfloat16"
    assert settings["attention_context_size"] == [128, 128]
    assert entries[1]["model"] == str(nemo)
    result = run(DIGITS, "--decoder", "transducer", options=("--model", golden / "ctc" / "model.nemo"))
    assert result.exit_code == 1
    assert "`decoder` must be ctc for this model, got 'transducer'" in result.stderr


def test_the_dtype_and_the_speed_are_printed_unless_quiet():
    result = run(DIGITS, options=("--model", "demo"))
    model_line, summary = result.stderr.splitlines()[-2:]
    assert "model demo on cpu in " in model_line
    assert "bfloat16 natively" in model_line
    assert summary.startswith("1 file transcribed, 2.7 s of audio in ")
    assert run(DIGITS).stderr == ""


def test_the_names_that_the_help_lists_are_those_of_the_library():
    # the help is printed without an import of the library
    assert list(subtitles.FORMATS) == list(FORMAT_NAMES)
    assert [choice.value for choice in transcribe.Format] == [*FORMAT_NAMES, "all"]
    assert {choice.value for choice in transcribe.Dtype} == set(transcription.DTYPES)
    assert transcribe.DEFAULT_MODEL == transcription.DEFAULT_MODEL


def test_the_model_of_the_environment_is_used():
    result = run(DIGITS, options=("--quiet",), env={"PARAKEET_MODEL": "demo"})
    assert result.stdout == "one two three\n"


def test_the_error_about_a_model_names_the_ways_to_local_models():
    result = run(FIRST, options=("--model", "no/such/folder"))
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert "no/such/folder" in line
    assert "`--model FOLDER` or `--model FILE.nemo`" in line
    assert "`--model demo`" in line


@pytest.mark.parametrize("form", ["folder", "nemo"])
def test_transcribe_uses_the_given_model(form, golden, tmp_path):
    model = golden / "tdt" / "model.nemo"
    if form == "folder":
        model = tmp_path / "model"
        shutil.copytree(tp.demo_model_path(), model)
    result = run(FIRST, options=("--model", model, "--quiet", "--dtype", "float32"))
    assert result.exit_code == 0, result.exception
    if form == "folder":
        assert result.stdout == run(FIRST).stdout


def test_errors_go_to_stderr_and_stdout_stays_valid_json(tmp_path):
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    good = [CLIPS / clip["file"] for clip in MANIFEST[:2]]
    result = run(good[0], nan, tmp_path / "missing.wav", good[1], "--format", "json")
    assert result.exit_code == 1
    assert [entry["file"] for entry in json.loads(result.stdout)] == [str(file) for file in good]
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert "NaN" in lines[0]
    # each line contains the name of the file once
    assert [line.count(str(file)) for line, file in zip(lines, (nan, tmp_path / "missing.wav"), strict=True)] == [1, 1]


def test_the_traceback_is_printed_if_the_verbosity_is_debug(tmp_path):
    missing = tmp_path / "missing.wav"
    result = run(missing, env={"TRANSFORMERS_VERBOSITY": "debug"})
    assert "Traceback" in result.stderr
    assert "in read_windows" in result.stderr
    assert "Traceback" not in run(missing).stderr


def test_json_is_an_empty_list_if_all_files_fail(tmp_path):
    for name in ("missing.wav", "*.wav"):
        result = run(tmp_path / name, "--format", "json")
        assert result.exit_code == 1
        assert json.loads(result.stdout) == []


def test_a_file_that_cannot_be_written_does_not_stop_the_others(tmp_path):
    (tmp_path / "one_two_three.txt").mkdir()
    result = run(DIGITS, FIRST, "--output-dir", tmp_path, "--overwrite")
    assert result.exit_code == 1
    assert str(DIGITS) in result.stderr
    assert (tmp_path / f"{FIRST.stem}.txt").read_text() == run(FIRST).stdout
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not allow such a name")
def test_a_file_name_that_is_not_utf8_is_written(tmp_path):
    name = os.fsdecode(b"\xff.flac")
    for target in (name, "one.flac"):
        shutil.copy(DIGITS, tmp_path / target)
    result = run(tmp_path, "--output-dir", tmp_path / "out", "--format", "all")
    assert result.exit_code == 0, result.stderr
    assert len(list((tmp_path / "out").iterdir())) == 12
    (path,) = (tmp_path / "out").glob("[!o]*.json")
    assert json.loads(path.read_text("utf-8"))["file"] == str(tmp_path / name)
    lines = run(tmp_path).stdout.splitlines()
    assert lines == [f"{tmp_path / 'one.flac'}: one two three", f"{tmp_path}/\ufffd.flac: one two three"]
    printed = [json.loads(line)["file"] for line in run(tmp_path, "--jsonl").stdout.splitlines()]
    assert printed == [str(tmp_path / "one.flac"), str(tmp_path / name)]


def test_insufficient_memory_for_one_file_does_not_stop_the_others(tmp_path, monkeypatch):
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros(16000 * 20, np.float32), 16000)
    generate = tp.ParakeetForTDT.generate

    def allocate(model, input_features, **kwargs):
        """Allocate more memory than a machine has, for a clip of more than 10 s."""
        if input_features.shape[1] > 1000:
            torch.empty(2**60, dtype=torch.uint8)
        return generate(model, input_features=input_features, **kwargs)

    monkeypatch.setattr(tp.ParakeetForTDT, "generate", allocate)
    result = run(long, FIRST)
    assert result.exit_code == 1
    assert result.stdout == f"{FIRST}: {MANIFEST[0]['text']}\n"
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{long}: ")
    assert "memory" in line


def test_error_messages_are_not_wrapped(tmp_path):
    name = tmp_path / ("long" * 30) / "missing.wav"
    result = run(name, env={"COLUMNS": "80"})
    assert str(name) in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_json_is_printed_at_once_and_closed_when_interrupted(tmp_path):
    waiting = tmp_path / "waiting.wav"
    os.mkfifo(waiting)
    command = [sys.executable, "-m", "transformers_parakeet_cli", "transcribe", FIRST, waiting]
    command += ["--format", "json", "--batch-size", "1", *OPTIONS]
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # a shell that runs the tests in the background makes its child processes ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    # opening blocks until the command reads the second file
    with open(waiting, "wb"):
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert [entry["text"] for entry in json.loads(printed)] == [MANIFEST[0]["text"]]


# Runs the command in child processes, which are ended by a signal at random moments after the first output. The parent
# process has loaded the model, so a child starts at once. After each child, the output files must be complete: equal to
# those of the uninterrupted run in the folder `reference`. Prints how many files existed after each child.
INTERRUPTED = """
import os, pathlib, random, signal, sys, time, torch
torch.set_num_threads(1)
from transformers_parakeet_cli import job
from transformers_parakeet_cli.app import app
pipeline = job.load_pipeline("demo")
pipeline(next(pathlib.Path(sys.argv[1]).glob("in/*")).as_posix())
job.load_pipeline = lambda *args, **options: pipeline
folder = pathlib.Path(sys.argv[1])
random.seed(0)

def start(name):
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        options = ["--model", "demo", "--format", "all", "--quiet", "--batch-size", "2"]
        app(["transcribe", str(folder / "in"), "--output-dir", str(folder / name), *options])
    while not (folder / name / "clip0.tsv").exists():
        time.sleep(0.001)
    return pid

def read(name):
    return {path.name: path.read_text() for path in (folder / name).glob("*") if not path.name.startswith(".")}

pid = start("reference")
begin = time.monotonic()
while len(list((folder / "reference").glob("*.tsv"))) < 14:
    time.sleep(0.001)
# time from the first output to the last one
duration = time.monotonic() - begin
assert os.waitpid(pid, 0)[1] == 0
reference = read("reference")
for number in range(11):
    name = f"out{number}"
    pid = start(name)
    time.sleep(random.random() * duration)
    # the last child is interrupted as by Ctrl-C
    os.kill(pid, signal.SIGINT if number == 10 else signal.SIGKILL)
    os.waitpid(pid, 0)
    files = read(name)
    assert files.items() <= reference.items(), name
    print(len(files))
assert list((folder / "out10").glob(".*")) == []
(folder / "out5" / ".clip9.txt.1.partial").write_text("incomplete")
assert os.waitpid(start("out5"), 0)[1] == 0
assert read("out5") == reference
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts child processes by fork")
def test_processes_that_are_killed_leave_only_complete_files(tmp_path):
    copy_clips(tmp_path / "in", 14)
    counts = [int(line) for line in run_program(INTERRUPTED, tmp_path).split()]
    assert len(counts) == 11
    # at least one process was killed while it wrote files
    assert any(0 < count < 70 for count in counts)


def test_a_url_is_transcribed(tmp_path, monkeypatch):
    requests = []

    class Response(io.BytesIO):
        headers: ClassVar[dict[str, str]] = {}

    def open_url(request, timeout):
        requests.append(request.full_url)
        return Response(DIGITS.read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", open_url)
    url = "https://example.org/a/my%20talk.flac?version=2"
    assert run(url, "--output-dir", tmp_path).exit_code == 0
    assert read_files(tmp_path) == {"my talk.txt": "one two three\n"}
    assert len(requests) == 1


def test_a_device_that_the_machine_lacks_is_an_error_in_one_line():
    for device, reason in (("cuda:99", "'cuda:99'"), ("gpu", "'gpu'")):
        result = run(DIGITS, "--device", device)
        assert (result.exit_code, result.stdout) == (1, "")
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"`device` must be available, got {reason} (")
        assert "use one of cpu" in line


def test_a_missing_file_is_named_without_the_number_of_the_error(tmp_path):
    result = run(tmp_path / "missing.wav", options=OPTIONS)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == f"{tmp_path / 'missing.wav'}: No such file or directory: correct the path"


def test_the_messages_name_the_limit_of_the_demo_model_and_the_output_folder(tmp_path):
    first, _, summary = run(DIGITS, "--output-dir", tmp_path, options=OPTIONS).stderr.splitlines()
    assert first == "the demo model recognises only spoken English digits"
    assert summary.endswith(f"; outputs in {tmp_path}")


def test_a_text_file_with_the_ending_of_an_audio_file_cannot_be_read_as_audio(tmp_path):
    (tmp_path / "notes.flac").write_text("no audio")
    assert "notes.flac cannot be read as audio (libsndfile: " in run(tmp_path / "notes.flac").stderr

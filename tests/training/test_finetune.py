"""The commands `parakeet finetune` and `parakeet evaluate`, and the example that trains from random weights."""

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import jiwer
import pytest
import soundfile
import torch
from conftest import TESTS, noise, run_program
from safetensors.torch import load_file
from training_helpers import SENTENCES, sentence_rows
from transformers import pipeline
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.training import FinetuneArguments
from transformers_parakeet.training.finetune import load_data
from transformers_parakeet_cli.app import app

EXAMPLES = TESTS.parent / "examples"
ROWS = sentence_rows()
CLIPS = tp.demo_model_path() / "clips"
QUICK = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", "1"]


def run(*arguments):
    """Run the command `parakeet`; return its result, or raise the exception that it did not handle."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A manifest of the demo clips."""
    path = tmp_path_factory.mktemp("digits") / "manifest.jsonl"
    clips = json.loads((CLIPS / "manifest.json").read_text(encoding="utf-8"))
    lines = [{"audio_filepath": str(CLIPS / clip["file"]), "text": clip["text"], "duration": 3.0} for clip in clips]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_json_lines(path):
    """Return the JSON objects of a file, one per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def finetune(folder, *options, model=None, data=SENTENCES):
    """Run `parakeet finetune` on the demo model or another one; return its result."""
    return run("finetune", "--model", model or "demo", "--train_data", data, "--output_dir", folder, *QUICK, *options)


def changed_weights(old_folder, new_folder):
    """Return the names of the tensors that differ between two saved models."""
    old, new = (load_file(folder / "model.safetensors") for folder in (old_folder, new_folder))
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def printed_error_rate(output):
    """Return the word error rate that `parakeet evaluate` printed, as a fraction."""
    return float(re.search(r"word error rate +([\d.]+) ?%", output).group(1)) / 100


def test_a_model_is_trained_saved_and_scored(digits, tmp_path):
    options = ["--eval_data", digits, "--max_steps", 2, "--per_device_train_batch_size", 4, "--freeze", "encoder"]
    options += ["--spec_augment", '{"time_masks": 2, "time_width": 0.05}']
    result = finetune(tmp_path / "out", *options, data=digits)
    # one line per update with the loss, and an evaluation after the epoch, which is not repeated at the end
    assert len(re.findall(r"^step [12] of 2, epoch .*: loss [\d.]+, learning rate ", result.stderr, re.MULTILINE)) == 2
    (rate,) = re.findall(r"^step 2 of 2, epoch 1\.00: evaluation loss .*word error rate ([\d.]+%)", result.stderr, re.M)
    assert result.stdout.splitlines()[-1] == f"wrote {tmp_path / 'out'}; word error rate {rate}"
    assert result.stderr.splitlines()[-1] == f"next: parakeet transcribe --model {tmp_path / 'out'} FILE"
    changed = changed_weights(tp.demo_model_path(), tmp_path / "out")
    assert changed
    assert not [name for name in changed if name.startswith("encoder.")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["spec_augment"]["time_masks"] == 2
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path / "out"))
    rows = read_json_lines(digits)
    hypotheses = [pipe(row["audio_filepath"])["text"] for row in rows]
    expected = jiwer.wer([row["text"] for row in rows], hypotheses)
    assert expected < 0.5
    output = tmp_path / "clips.jsonl"
    result = run("evaluate", tmp_path / "out", digits, "--output", output, "--batch-size", 3)
    assert "8 clips" in result.stdout
    assert printed_error_rate(result.stdout) == pytest.approx(expected, abs=1e-4)
    assert [clip["hypothesis"] for clip in read_json_lines(output)] == hypotheses


def test_a_nemo_file_is_trained_in_batches_by_duration(golden, tmp_path):
    model = golden / "hybrid_tdt_ctc" / "model.nemo"
    finetune(tmp_path, "--max_steps", 2, "--batch_duration_s", 6, "--learning_rate", 1e-3, model=model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ParakeetForTDT"]
    before, after = load_nemo(model)[0], load_nemo(tmp_path)[0]
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)
    result = run("transcribe", ROWS[0]["audio"], "--model", tmp_path)
    assert result.exit_code == 0


def test_a_stream_is_trained_on(tmp_path):
    finetune(tmp_path, "--streaming", "--max_steps", 3, "--per_device_train_batch_size", 2, "--learning_rate", 1e-3)
    assert changed_weights(tp.demo_model_path(), tmp_path)


def test_training_stops_when_the_word_error_rate_no_longer_falls_and_can_be_resumed(digits, tmp_path):
    common = ["--save_strategy", "steps", "--save_steps", 1, "--learning_rate", 0, "--per_device_train_batch_size", 8]
    options = ["--eval_data", digits, "--eval_strategy", "steps", "--eval_steps", 1, "--early_stopping_patience", 2]
    options += ["--load_best_model_at_end", "--report_to", "tensorboard"]
    # only older releases of transformers have this option
    if "logging_dir" in run("finetune", "--help").stdout:
        options += ["--logging_dir", tmp_path / "logs"]
    finetune(tmp_path, *common, *options, "--max_steps", 20, data=digits)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    assert not (tmp_path / "checkpoint-4").exists()
    assert list(tmp_path.rglob("events.out.tfevents*"))
    shutil.rmtree(tmp_path / "checkpoint-3")
    finetune(tmp_path, *common, "--max_steps", 4, "--resume_from_checkpoint", "last", data=digits)
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    # the second run has no evaluations: these are from the first run, up to the checkpoint it resumed from
    assert [entry["step"] for entry in history if "eval_wer" in entry] == [1, 2]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


def test_adapters_are_saved_separately_and_merged(tmp_path):
    from peft import PeftModel

    finetune(tmp_path, "--lora_rank", 4, "--max_steps", 3, "--learning_rate", 1e-2, "--per_device_train_batch_size", 4)
    base_model, processor = load_nemo(tp.demo_model_path())
    inputs = processor([noise(2.0)], sampling_rate=16000)
    with torch.no_grad():
        base_logits = base_model.eval()(**inputs).logits
        adapted_logits = PeftModel.from_pretrained(base_model, tmp_path / "adapter").eval()(**inputs).logits
        merged_logits = load_nemo(tmp_path)[0](**inputs).logits
    assert not torch.allclose(base_logits, adapted_logits, atol=1e-2)
    # measured: 1e-5 on logits of up to 25
    assert torch.allclose(merged_logits, adapted_logits, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


def test_a_broken_clip_ends_the_training_with_its_name_or_is_skipped(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no audio" * 100)
    lines = [{"audio_filepath": row["audio"], "text": row["text"]} for row in ROWS[:3]]
    lines.append({"audio_filepath": str(tmp_path / "bad.wav"), "text": "nothing"})
    manifest = tmp_path / "manifest.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--max_steps", 2, "--per_device_train_batch_size", 4]
    result = finetune(tmp_path / "out", *options, data=manifest)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if str(tmp_path / "bad.wav") in line]
    assert line.count("bad.wav") == 1
    result = finetune(tmp_path / "out", *options, "--skip_broken", data=manifest)
    assert "skipped clips 2" in result.stderr


def test_options_can_come_from_a_file(tmp_path):
    options = {
        "model": str(tp.demo_model_path()),
        "train_data": str(SENTENCES),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    (tmp_path / "options.json").write_text(json.dumps(options))
    run("finetune", tmp_path / "options.json")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_help_lists_our_options_and_those_of_transformers():
    output = run("finetune", "--help").stdout
    names = ("--batch_duration_s", "--learning_rate", "--gradient_checkpointing", "--bf16")
    assert [name for name in names if name not in output] == []


def test_an_invalid_command_line_prints_a_short_usage():
    result = run("finetune", "--model", "demo")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 4
    assert "required: --train_data" in result.stderr.splitlines()[-1]


def test_a_model_of_another_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "model.safetensors").touch()
    result = finetune(tmp_path / "out", model=tmp_path)
    assert result.exit_code == 1
    assert "must contain a Parakeet model with a head, but the model type is 'whisper'" in result.stderr


def test_added_tokens_leave_the_rows_of_existing_tokens_unchanged(golden, tmp_path):
    model = golden / "hybrid_tdt_ctc" / "model.nemo"
    finetune(tmp_path, "--max_steps", 1, "--learning_rate", 0, "--new_tokens", "ß", "æ", model=model)
    before = load_nemo(model)[0]
    after, processor = load_nemo(tmp_path)
    num_labels = before.config.vocab_size - 1
    assert processor.tokenizer.convert_ids_to_tokens([num_labels, num_labels + 1]) == ["ß", "æ"]
    assert after.config.vocab_size == before.config.vocab_size + 2
    assert after.config.blank_token_id == num_labels + 2
    assert torch.equal(after.joint.head.weight[:num_labels], before.joint.head.weight[:num_labels])


def test_a_tokenizer_can_be_replaced(golden, tmp_path):
    other_archive = golden / "tdt" / "model.nemo"
    with tarfile.open(other_archive) as tar:
        (name,) = [name for name in tar.getnames() if name.endswith("tokenizer.model")]
        (tmp_path / "other.model").write_bytes(tar.extractfile(name).read())
    options = ["--max_steps", 1, "--tokenizer", tmp_path / "other.model"]
    finetune(tmp_path / "out", *options, model=golden / "ctc" / "model.nemo")
    model, processor = load_nemo(tmp_path / "out")
    expected = load_nemo(other_archive)[1].tokenizer
    assert processor.tokenizer("the answer")["input_ids"] == expected("the answer")["input_ids"]
    assert model.config.vocab_size == len(expected)


def run_from_scratch(monkeypatch, capsys, *options):
    """Run `examples/from_scratch.py`; return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import from_scratch

    num_threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", *map(str, options)])
    try:
        from_scratch.main()
    finally:
        torch.set_num_threads(num_threads)
    return capsys.readouterr().out


def test_the_smoke_test_of_the_example_learns_the_demo_clips_and_says_what_it_is(monkeypatch, capsys, tmp_path):
    output = run_from_scratch(monkeypatch, capsys, "--output", tmp_path, "--steps", 240)
    assert output.startswith("SMOKE TEST: no --data")
    assert "git clone https://github.com/Jakobovski/free-spoken-digit-dataset" in output
    rates = [float(rate) for rate in re.findall(r"'eval_demo clips \(trained on\)_wer': '?([\d.]+)", output)]
    assert len(rates) >= 10
    assert max(rates[:3]) >= 0.9
    # measured: 0.04
    assert rates[-1] < 0.3
    assert re.search(r"demo clips \(trained on\) +8 clips +WER +[\d.]+%", output)


def test_the_example_trains_on_a_clone_of_the_digit_dataset(monkeypatch, capsys, tmp_path):
    recordings = tmp_path / "clone" / "recordings"
    recordings.mkdir(parents=True)
    for digit in range(10):
        for speaker, number in (("george", 0), ("george", 5), ("jackson", 49), ("theo", 7)):
            soundfile.write(recordings / f"{digit}_{speaker}_{number}.wav", noise(0.5, digit), 8000)
    options = ["--data", tmp_path / "clone", "--output", tmp_path / "out", "--steps", 2]
    output = run_from_scratch(monkeypatch, capsys, *options)
    assert "SMOKE TEST" not in output
    assert re.search(r"fsdd_dev +10 clips +WER", output)
    assert re.search(r"fsdd_test +10 clips +WER", output)
    import from_scratch

    train = from_scratch.DigitRecordings(recordings, "train")
    assert train.texts == sorted(2 * list(from_scratch.DIGITS), key=from_scratch.DIGITS.index)
    # 8000 samples at 8 kHz
    assert train.durations == [1.0] * 20


def test_the_example_says_what_data_it_needs(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"--data must name a clone of .* packed speech fsdd"):
        run_from_scratch(monkeypatch, capsys, "--data", tmp_path)


def test_an_evaluation_split_that_the_data_lacks_is_refused(tmp_path):
    result = finetune(tmp_path, "--eval_split", "validation", "--max_steps", 1)
    assert result.exit_code == 1
    assert "manifest.jsonl has no split 'validation'" in result.stderr
    result = run("evaluate", tp.demo_model_path(), SENTENCES, "--split", "validation")
    assert result.exit_code == 1
    assert "has no split 'validation'" in result.stderr


def test_a_stream_is_shuffled_in_a_buffer():
    def load_texts(seed=3, **options):
        """Return the training stream and its texts."""
        arguments = FinetuneArguments("model", str(SENTENCES), streaming=True, **options)
        train, evaluation = load_data(arguments, seed)
        assert evaluation is None
        return train, [row["text"] for row in train]

    in_order = [row["text"] for row in ROWS]
    train, texts = load_texts()
    assert texts != in_order
    assert sorted(texts) == sorted(in_order)
    # a resumed run gets the same order, the next epoch another one
    assert load_texts()[1] == texts
    train.set_epoch(1)
    assert texts != [row["text"] for row in train] != in_order
    assert load_texts(shuffle_buffer=0)[1] == in_order


def test_a_stream_for_evaluation_is_not_shuffled():
    options = FinetuneArguments("model", str(SENTENCES), eval_data=str(SENTENCES), streaming=True)
    _, evaluation = load_data(options, seed=3)
    assert [row["text"] for row in evaluation] == [row["text"] for row in ROWS]


def test_spec_augment_must_be_json(tmp_path):
    result = finetune(tmp_path, "--spec_augment", "time_masks=2", "--max_steps", 1)
    assert result.exit_code == 1
    assert "`spec_augment` must be a JSON object or none, got 'time_masks=2'" in result.stderr


def test_the_uploaded_folder_has_the_merged_model(tmp_path, monkeypatch):
    uploads = []

    def upload_folder(*args, folder_path, **kwargs):
        """Record the files of an upload."""
        files = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
        uploads.append({str(file) for file in files})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload_folder, raising=False)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    finetune(tmp_path, "--lora_rank", 4, "--max_steps", 1, "--per_device_train_batch_size", 4, "--push_to_hub")
    (files,) = uploads
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "adapter/adapter_model.safetensors",
    } <= files
    assert "adapter_config.json" not in files
    assert "adapter_model.safetensors" not in files
    assert isinstance(load_nemo(tmp_path)[0], tp.ParakeetForTDT)


def test_a_trained_folder_is_uploaded_once(tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda self, *args, **kwargs: uploads.append(args))
    finetune(tmp_path, "--max_steps", 1, "--per_device_train_batch_size", 4, "--push_to_hub")
    assert len(uploads) == 1


def write_broken_manifest(folder):
    """Write a manifest whose second line is not JSON; return its path."""
    (folder / "manifest.json").write_text('{"audio_filepath": "a.wav", "text": "one"}\nno json\n')
    return folder / "manifest.json"


# function that returns data and options for a folder, and the expected message
FAULTS = [
    pytest.param(lambda folder: (folder / "missing.jsonl", []), "missing.jsonl", id="no manifest"),
    pytest.param(lambda folder: (write_broken_manifest(folder), []), "line 2", id="broken line"),
    pytest.param(lambda folder: (f"{folder}/clips", []), "there is no file or folder", id="no folder"),
    pytest.param(lambda folder: ("tests/clipz", []), "there is no file or folder tests/clipz", id="mistyped folder"),
    pytest.param(lambda folder: ("trian.csv", []), "there is no file or folder trian.csv", id="mistyped file"),
    pytest.param(
        lambda folder: (SENTENCES, ["--decoder", "attention"]),
        "transducer or ctc for this model, got 'attention'",
        id="decoder",
    ),
]


@pytest.mark.parametrize(("create_fault", "message"), FAULTS)
@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_the_error_about_invalid_data_or_options_is_one_line(command, create_fault, message, tmp_path, monkeypatch):
    monkeypatch.chdir(TESTS.parent)
    data, options = create_fault(tmp_path)
    if command == "evaluate":
        result = run("evaluate", tp.demo_model_path(), data, *options)
    else:
        result = finetune(tmp_path / "out", "--max_steps", 1, *options, data=data)
    assert result.exit_code == 1
    notes = ("parameters are train", f"model {tp.demo_model_path()} on ")
    (line,) = [line for line in result.stderr.splitlines() if not any(note in line for note in notes)]
    assert message in line


def run_without(package, *arguments, status=0):
    """Run the command `parakeet` in an environment without a package; return its output, see `run_program`."""
    program = f"""
    import sys
    sys.modules["{package}"] = None
    from transformers_parakeet_cli.app import app
    app(sys.argv[1:])
    """
    return run_program(program, *arguments, status=status)


def test_a_manifest_does_not_need_the_package_datasets(digits, tmp_path):
    output = run_without("datasets", "evaluate", tp.demo_model_path(), digits)
    assert "8 clips, " in output
    options = ["--model", tp.demo_model_path(), "--train_data", digits, "--output_dir", tmp_path / "out", *QUICK]
    run_without("datasets", "finetune", *options, "--max_steps", "1", "--batch_duration_s", "9")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_the_extra_of_a_missing_package_is_named_in_one_line(command, tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\n")
    arguments = {
        "evaluate": [tp.demo_model_path(), tmp_path],
        "finetune": ["--model", tp.demo_model_path(), "--train_data", tmp_path, "--output_dir", tmp_path, *QUICK],
    }
    _, errors = run_without("datasets", command, *arguments[command], status=1)
    # other packages may print warnings before
    assert errors.splitlines()[-1] == (
        "this data needs the package datasets, which is not installed: install the extra `train`: "
        "pip install -e '.[train]' in a checkout of transformers-parakeet"
    )
    assert "Traceback" not in errors


def test_fine_tuning_without_accelerate_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    result = finetune(tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith("training needs the package accelerate, which is not installed: install the extra")

"""The commands that train and score, from the command line to a folder that a pipeline loads."""

import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

import jiwer
import pytest
import torch
from conftest import TESTS, noise, run_program
from safetensors.torch import load_file
from training_helpers import SENTENCES, sentence_rows
from transformers import pipeline
from typer.testing import CliRunner

import transformers_parakeet as tp
from transformers_parakeet import load_nemo
from transformers_parakeet.cli.app import app
from transformers_parakeet.training.finetune import FinetuneArguments, load_data

EXAMPLES = TESTS.parent / "examples"
ROWS = sentence_rows()
CLIPS = tp.demo_model_path() / "clips"
QUICK = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "true", "--save_strategy", "no", "--logging_steps", "1"]


def run(*given):
    result = CliRunner().invoke(app, [str(item) for item in given], env={"COLUMNS": "200"})
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


def finetune(folder, *given, model=None, data=SENTENCES):
    model = tp.demo_model_path() if model is None else model
    return run("finetune", "--model", model, "--train_data", data, "--output_dir", folder, *QUICK, *given)


def word_error_rate(printed):
    return float(re.search(r"word error rate ([\d.]+) ?%", printed).group(1)) / 100


def test_a_folder_is_trained_scored_and_loads(digits, tmp_path):
    finetune(tmp_path / "out", "--eval_data", digits, "--max_steps", 2, "--per_device_train_batch_size", 4,
             "--freeze", "encoder", "--spec_augment", '{"time_masks": 2, "time_width": 0.05}', data=digits)  # fmt: skip
    old, new = (load_file(folder / "model.safetensors") for folder in (tp.demo_model_path(), tmp_path / "out"))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed
    assert not [name for name in changed if name.startswith("encoder.")]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["spec_augment"]["time_masks"] == 2
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path / "out"))
    said = [json.loads(line) for line in digits.read_text().splitlines()]
    texts = [pipe(row["audio_filepath"])["text"] for row in said]
    expected = jiwer.wer([row["text"] for row in said], texts)
    assert expected < 0.5
    result = run("evaluate", tmp_path / "out", digits, "--output", tmp_path / "heard.jsonl", "--batch-size", 3)
    assert "8 clips" in result.stdout
    assert word_error_rate(result.stdout) == pytest.approx(expected, abs=1e-4)
    heard = [json.loads(line) for line in (tmp_path / "heard.jsonl").read_text().splitlines()]
    assert [clip["hypothesis"] for clip in heard] == texts


def test_a_nemo_file_is_trained_by_seconds_per_batch(golden, tmp_path):
    model = golden / "hybrid_tdt_ctc" / "model.nemo"
    finetune(tmp_path, "--max_steps", 2, "--batch_duration_s", 6, "--learning_rate", 1e-3, model=model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["ParakeetForTDT"]
    before, after = load_nemo(model)[0], load_nemo(tmp_path)[0]
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    heard = run("transcribe", ROWS[0]["audio"], "--model", tmp_path)
    assert heard.exit_code == 0


def test_a_stream_is_trained_on(tmp_path):
    finetune(tmp_path, "--streaming", "--max_steps", 3, "--per_device_train_batch_size", 2, "--learning_rate", 1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (tp.demo_model_path(), tmp_path))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_training_stops_when_the_word_error_rate_no_longer_falls_and_resumes(digits, tmp_path):
    given = ["--eval_data", digits, "--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--learning_rate",
             0, "--early_stopping_patience", 2, "--per_device_train_batch_size", 8, "--load_best_model_at_end",
             "--report_to", "tensorboard", "--logging_dir", tmp_path / "logs"]  # fmt: skip
    if "logging_dir" not in run("finetune", "--help").stdout:
        given = given[:-2]
    finetune(tmp_path, *given, "--max_steps", 20, "--save_strategy", "steps", data=digits)
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 1
    assert not (tmp_path / "checkpoint-4").exists()
    assert list(tmp_path.rglob("events.out.tfevents*"))
    shutil.rmtree(tmp_path / "checkpoint-3")
    more = ["--save_strategy", "steps", "--save_steps", 1, "--learning_rate", 0, "--per_device_train_batch_size", 8]
    finetune(tmp_path, "--max_steps", 4, "--resume_from_checkpoint", "last", *more, data=digits)
    history = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    # the evaluations are the first run's, up to the checkpoint that was the last one
    assert [entry["step"] for entry in history if "eval_wer" in entry] == [1, 2]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]


def test_adapters_are_saved_alone_and_merged(tmp_path):
    from peft import PeftModel

    finetune(tmp_path, "--lora_rank", 4, "--max_steps", 3, "--learning_rate", 1e-2, "--per_device_train_batch_size", 4)
    base, processor = load_nemo(tp.demo_model_path())
    inputs = processor([noise(2.0)], sampling_rate=16000)
    with torch.no_grad():
        before = base.eval()(**inputs).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(**inputs).logits
        merged = load_nemo(tmp_path)[0](**inputs).logits
    assert not torch.allclose(before, adapted, atol=1e-2)
    # measured: 1e-5 on logits of up to 25
    assert torch.allclose(merged, adapted, atol=1e-4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 200_000


def test_a_broken_clip_ends_the_training_with_its_name_unless_it_may_be_skipped(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"no audio" * 100)
    lines = [{"audio_filepath": row["audio"], "text": row["text"]} for row in ROWS[:3]]
    lines.append({"audio_filepath": str(tmp_path / "bad.wav"), "text": "nothing"})
    manifest = tmp_path / "manifest.json"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = ["--max_steps", 2, "--per_device_train_batch_size", 4]
    result = finetune(tmp_path / "out", *given, data=manifest)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if str(tmp_path / "bad.wav") in line]
    assert line.count("bad.wav") == 1
    result = finetune(tmp_path / "out", *given, "--skip_broken", data=manifest)
    assert "'broken_clips': '2'" in result.stdout or "'broken_clips': 2" in result.stdout


def test_options_can_come_from_a_file_and_are_listed(tmp_path):
    options = {"model": str(tp.demo_model_path()), "train_data": str(SENTENCES), "output_dir": str(tmp_path / "out"),
               "max_steps": 1, "use_cpu": True, "report_to": "none", "per_device_train_batch_size": 2,
               "disable_tqdm": True}  # fmt: skip
    (tmp_path / "options.json").write_text(json.dumps(options))
    run("finetune", tmp_path / "options.json")
    assert (tmp_path / "out" / "model.safetensors").exists()
    listed = run("finetune", "--help").stdout
    assert all(
        name in listed for name in ("--batch_duration_s", "--learning_rate", "--gradient_checkpointing", "--bf16")
    )


def test_another_kind_of_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "whisper"}')
    (tmp_path / "model.safetensors").touch()
    result = finetune(tmp_path / "out", model=tmp_path)
    assert result.exit_code == 1
    assert "holds a model of type 'whisper'" in result.stderr


def test_tokens_are_added_and_what_was_learnt_stays(golden, tmp_path):
    model = golden / "hybrid_tdt_ctc" / "model.nemo"
    finetune(tmp_path, "--max_steps", 1, "--learning_rate", 0, "--new_tokens", "ß", "æ", model=model)
    before = load_nemo(model)[0]
    after, new = load_nemo(tmp_path)
    labels = before.config.vocab_size - 1
    assert new.tokenizer.convert_ids_to_tokens([labels, labels + 1]) == ["ß", "æ"]
    assert after.config.vocab_size == before.config.vocab_size + 2
    assert after.config.blank_token_id == labels + 2
    torch.testing.assert_close(after.joint.head.weight[:labels], before.joint.head.weight[:labels], rtol=0, atol=0)


def test_a_tokenizer_can_be_replaced(golden, tmp_path):
    archive = golden / "ctc" / "model.nemo"
    donor = golden / "tdt" / "model.nemo"
    with tarfile.open(donor) as tar:
        (name,) = [name for name in tar.getnames() if name.endswith("tokenizer.model")]
        content = tar.extractfile(name).read()
    (tmp_path / "other.model").write_bytes(content)
    finetune(tmp_path / "out", "--max_steps", 1, "--tokenizer", tmp_path / "other.model", model=archive)
    model, processor = load_nemo(tmp_path / "out")
    wanted = load_nemo(donor)[1].tokenizer
    assert processor.tokenizer("the answer")["input_ids"] == wanted("the answer")["input_ids"]
    assert model.config.vocab_size == len(wanted)


def from_scratch(monkeypatch, capsys, *given):
    """Run the example; return what it prints."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import from_scratch as example

    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["from_scratch.py", *map(str, given)])
    try:
        example.main()
    finally:
        torch.set_num_threads(threads)
    return capsys.readouterr().out


def test_a_model_from_scratch_gets_better_within_a_minute(monkeypatch, capsys, tmp_path):
    printed = from_scratch(
        monkeypatch, capsys, "digits", "--data", tmp_path / "none", "--output", tmp_path, "--steps", 240
    )
    rates = [float(rate) for rate in re.findall(r"'eval_clips_wer': '?([\d.]+)", printed)]
    assert len(rates) >= 10
    assert max(rates[:3]) >= 0.9
    # measured: 0.04
    assert rates[-1] < 0.3
    assert re.search(r"clips +8 clips +WER +[\d.]+%", printed)


@pytest.mark.slow
def test_the_sentence_recipe_runs_on_packed_speech(monkeypatch, capsys, tmp_path):
    for corpus in ("librispeech20", "speechocean762"):
        pack(tmp_path / corpus)
    given = ["sentences", "--data", tmp_path, "--output", tmp_path / "out", "--vocabulary", 64, "--batch-duration", 20]
    given += ["--encoder", tp.demo_model_path()]
    printed = from_scratch(monkeypatch, capsys, *given, "--steps", 2)
    assert len(re.findall(r"_(?:dev|test) +20 clips +WER", printed)) == 4
    assert (tmp_path / "out" / "model.safetensors").exists()


def pack(folder):
    """Write the sentences as packed speech, one file for all splits."""
    folder.mkdir()
    lines = []
    with open(folder / "all.tar", "wb") as packed:
        for row in ROWS:
            data = Path(row["audio"]).read_bytes()
            place = {"tar": "all.tar", "offset": packed.tell(), "nbytes": len(data)}
            packed.write(data)
            entry = {**row, **place, "id": row["audio_filepath"]}
            lines += [{**entry, "split": split} for split in ("train", "dev", "test")]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_evaluation_needs_a_split_or_data_of_its_own(tmp_path):
    result = finetune(tmp_path, "--eval_split", "validation", "--max_steps", 1)
    assert result.exit_code == 1
    assert "manifest.jsonl has no split 'validation'" in result.stderr
    result = run("evaluate", tp.demo_model_path(), SENTENCES, "--split", "validation")
    assert result.exit_code == 1
    assert "has no split 'validation'" in result.stderr


def texts_of(data):
    return [row["text"] for row in data]


def test_a_stream_is_shuffled_in_a_buffer():
    options = FinetuneArguments("model", str(SENTENCES), eval_data=str(SENTENCES), streaming=True)
    train, evaluation = load_data(options, seed=3)
    said = [row["text"] for row in ROWS]
    assert texts_of(evaluation) == said
    first = texts_of(train)
    assert first != said
    assert sorted(first) == sorted(said)
    # the same after an interruption, another order in the next epoch
    assert texts_of(load_data(options, seed=3)[0]) == first
    train.set_epoch(1)
    assert first != texts_of(train) != said
    ordered, _ = load_data(FinetuneArguments("model", str(SENTENCES), streaming=True, shuffle_buffer=0), seed=3)
    assert texts_of(ordered) == said


def test_adapters_are_pushed_merged(tmp_path, monkeypatch):
    """The root of the folder holds the merged model alone when it goes to the Hub."""
    pushed = []

    def upload(*args, folder_path, **kwargs):
        files = [path.relative_to(folder_path) for path in Path(folder_path).rglob("*") if path.is_file()]
        pushed.append({str(file) for file in files})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("transformers.trainer.upload_folder", upload, raising=False)
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer._finish_current_push", lambda self: None)
    finetune(tmp_path, "--lora_rank", 4, "--max_steps", 1, "--per_device_train_batch_size", 4, "--push_to_hub")
    assert len(pushed) == 1
    assert {
        "config.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "adapter/adapter_model.safetensors",
    } <= pushed[0]
    assert "adapter_config.json" not in pushed[0]
    assert "adapter_model.safetensors" not in pushed[0]
    assert isinstance(load_nemo(tmp_path)[0], tp.ParakeetForTDT)


def test_a_trained_folder_is_pushed_once(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr("transformers.Trainer.push_to_hub", lambda self, *args, **kwargs: pushed.append(args))
    finetune(tmp_path, "--max_steps", 1, "--per_device_train_batch_size", 4, "--push_to_hub")
    assert len(pushed) == 1


def broken_line(folder):
    (folder / "manifest.json").write_text('{"audio_filepath": "a.wav", "text": "one"}\nno json\n')
    return folder / "manifest.json"


FAULTS = [
    pytest.param(lambda folder: (folder / "missing.jsonl", []), "missing.jsonl", id="no manifest"),
    pytest.param(lambda folder: (broken_line(folder), []), "line 2", id="broken line"),
    pytest.param(lambda folder: (f"{folder}/clips", []), "there is no file or folder", id="no folder"),
    pytest.param(lambda folder: ("tests/clipz", []), "there is no file or folder tests/clipz", id="mistyped folder"),
    pytest.param(lambda folder: ("trian.csv", []), "there is no file or folder trian.csv", id="mistyped file"),
    pytest.param(
        lambda folder: (SENTENCES, ["--decoder", "attention"]), "transducer or ctc, got 'attention'", id="head"
    ),
]


@pytest.mark.parametrize(("fault", "message"), FAULTS)
@pytest.mark.parametrize("command", ["evaluate", "finetune"])
def test_faulty_data_and_options_are_one_line(command, fault, message, tmp_path, monkeypatch):
    monkeypatch.chdir(TESTS.parent)
    data, more = fault(tmp_path)
    if command == "evaluate":
        result = run("evaluate", tp.demo_model_path(), data, *more)
    else:
        result = finetune(tmp_path / "out", "--max_steps", 1, *more, data=data)
    assert result.exit_code == 1
    (line,) = [line for line in result.stderr.splitlines() if "parameters are trained" not in line]
    assert message in line


# datasets is not installed
WITHOUT_DATASETS = """
import sys
sys.modules["datasets"] = None
from transformers_parakeet.cli.app import app
app(sys.argv[1:])
"""


def test_a_manifest_needs_no_further_package(digits, tmp_path):
    printed = run_program(WITHOUT_DATASETS, "evaluate", tp.demo_model_path(), digits)
    assert printed.startswith(f"{len(digits.read_text().splitlines())} clips, word error rate")
    given = ["--model", tp.demo_model_path(), "--train_data", digits, "--output_dir", tmp_path / "out", *QUICK]
    given += ["--max_steps", "1", "--batch_duration_s", "9"]
    run_program(WITHOUT_DATASETS, "finetune", *given)
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_missing_extra_is_named_in_one_line(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.wav,one\n")
    _, errors = run_program(WITHOUT_DATASETS, "evaluate", tp.demo_model_path(), tmp_path, status=1)
    # other packages may have complained before
    assert errors.splitlines()[-1] == (
        "this training data is read by the package datasets, which is not installed: pip install datasets"
    )
    assert "Traceback" not in errors

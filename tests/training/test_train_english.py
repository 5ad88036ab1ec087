"""Tests of examples/train_english.py and examples/score_english.py, on the twenty sentences."""

import json
import sys
import tarfile

import numpy as np
import pytest
import torch
from conftest import TESTS
from training_helpers import sentence_rows

import transformers_parakeet as tp

EXAMPLES = TESTS.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    """Make the modules of the folder `examples` importable."""
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with the packed speech `english`: 16 sentences to train on, 2 for dev and 2 for test."""
    folder = tmp_path_factory.mktemp("data") / "english"
    folder.mkdir()
    entries = []
    with tarfile.open(folder / "clips.tar", "w") as archive:
        for index, row in enumerate(sentence_rows()):
            archive.add(row["audio"], arcname=row["audio_filepath"])
            split = "train" if index < 16 else "dev" if index < 18 else "test"
            entries.append({"id": str(index), "audio": row["audio_filepath"], "tar": "clips.tar", "split": split,
                            **{name: row[name] for name in ("text", "duration", "speaker")}})  # fmt: skip
    with tarfile.open(folder / "clips.tar") as archive:
        members = {member.name: member for member in archive}
        for entry in entries:
            member = members[entry["audio"]]
            entry.update(offset=member.offset_data, nbytes=member.size)
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, entries)), encoding="utf-8")
    return folder.parent


def run(monkeypatch, module, *options):
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("examples")
def test_training_and_scores(monkeypatch, capsys, data, tmp_path):
    import plot_curve
    import score_english
    import train_english
    import train_ngram

    monkeypatch.setitem(train_english.ENCODER, "hidden_size", 32)
    monkeypatch.setitem(train_english.ENCODER, "intermediate_size", 64)
    monkeypatch.setitem(train_english.ENCODER, "num_hidden_layers", 2)
    cache = tmp_path / "features"
    options = ["--data", data, "--cache", cache, "--averaged", 2]
    run(monkeypatch, train_english, "ctc", *options, "--output", tmp_path / "ctc", "--updates", 20)
    output = capsys.readouterr().out
    assert "english          WER" in output
    curve = json.loads((tmp_path / "ctc" / "curve.json").read_text(encoding="utf-8"))
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    assert np.mean(losses[-4:]) < 0.9 * losses[0]
    series = plot_curve.read_series(curve)
    assert [*series] == ["loss", "english wer", "english cer"]
    assert [value for _, value in series["loss"]] == [float(loss) for loss in losses]
    assert [step for step, _ in series["english cer"]] == [*range(2, 21, 2)]
    assert len(list((tmp_path / "ctc").glob("checkpoint-*"))) == 2
    # the features are stored once
    times = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    run(monkeypatch, train_english, "hybrid", *options, "--encoder", tmp_path / "ctc", "--output", tmp_path / "tdt",
        "--updates", 4)  # fmt: skip
    assert times == {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    model, processor = tp.load_nemo(tmp_path / "tdt")
    assert model.config.encoder_config.subsampling_factor == processor.subsampling_factor == 4
    assert model.config.ctc_head

    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(row["text"] for row in sentence_rows()[:16]), encoding="utf-8")
    run(monkeypatch, train_ngram, texts, tmp_path / "words.arpa.gz", "--order", 2, "--units", "words")
    capsys.readouterr()
    run(monkeypatch, score_english, "--model", tmp_path / "tdt", "--data", data, "--beams", 2, "--language-model",
        tmp_path / "words.arpa.gz")  # fmt: skip
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| english")]
    assert [row[:2] for row in rows] == [
        [f"| english {split}", name]
        for split in ("dev", "test")
        for name in ("greedy", "beam 2", "beam 2 + language model")
    ]
    for row in rows:
        low, _, high = row[3].partition(" to ")
        assert float(low) <= float(row[2]) <= float(high)


@pytest.mark.usefixtures("examples")
def test_accuracy_of_each_way_of_recognition(monkeypatch, capsys, data, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    import accuracy
    import train_english

    torch.manual_seed(0)
    train_speech, _ = train_english.open_corpora(data)
    model, processor = train_english.create_model("ctc", train_speech.texts, None)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    # both test clips have a rare word, so there are no rows for clips without one
    num_rows = {"int8": 3, "windows": 5, "streaming": 4, "boosting": 4}
    for measurement, count in num_rows.items():
        run(monkeypatch, accuracy, measurement, "--model", tmp_path / "model", "--data", data / "english")
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line[:1] == "|"][2:]
        assert len(rows) == count
        for row in rows:
            low, _, high = row[2].partition(" to ")
            assert float(low) <= float(row[1]) + 0.06
            assert float(row[1]) <= float(high) + 0.06


@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize("head", ["ctc", "hybrid"])
def test_the_ctc_head_of_a_trained_model_keeps_its_tokens(head, data, tmp_path):
    import train_english

    texts = train_english.open_corpora(data)[0].texts
    trained, trained_processor = train_english.create_model("ctc", texts, None)
    trained.save_pretrained(tmp_path)
    trained_processor.save_pretrained(tmp_path)
    model, processor = train_english.create_model(head, texts, tmp_path)
    for name, weight in trained.encoder.state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], weight)
    vocabulary, trained_vocabulary = (p.tokenizer.get_vocab() for p in (processor, trained_processor))
    common = [token for token in vocabulary if token in trained_vocabulary and token != "<pad>"]
    assert len(common) > 25
    for token in common:
        row, trained_row = vocabulary[token], trained_vocabulary[token]
        assert torch.equal(model.ctc_head.weight[row], trained.ctc_head.weight[trained_row])
        assert torch.equal(model.ctc_head.bias[row], trained.ctc_head.bias[trained_row])
    assert torch.equal(model.ctc_head.weight[-1], trained.ctc_head.weight[-1])


@pytest.mark.usefixtures("examples")
def test_clips_are_joined_by_speaker(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES.parent / "benchmarks")
    import accuracy

    def clip(name, seconds):
        return accuracy.Recording(name, np.ones(seconds * 16000, np.float32), f"text of {name}")

    clips = [("a", clip("1", 70)), ("b", clip("2", 3)), ("a", clip("3", 60)), ("a", clip("4", 5))]
    recordings = accuracy.join_recordings(clips)
    assert [recording.name for recording in recordings] == ["a-0", "a-1", "b-0"]
    assert [recording.text for recording in recordings] == ["text of 1 text of 3", "text of 4", "text of 2"]
    assert [len(recording.samples) for recording in recordings] == [131 * 16000, 88000, 56000]


@pytest.mark.usefixtures("examples")
def test_free_text_has_no_sentence_of_a_test_clip(monkeypatch, capsys, data, tmp_path):
    import prepare_text
    from packed_speech import PackedSpeech

    test_text = max(PackedSpeech(data / "english", "test").texts, key=len)
    text, output = tmp_path / "novel.txt", tmp_path / "sentences.txt"
    novel = (
        f"He said: \u2018It isn\u2019t late,\u2019 and left!  In 1812 it was cold.\n\nWell, {test_text}. Too short. "
    )
    novel += f"The caf\u00e9 is open. The cafe\u0301 is open. {PackedSpeech(data / 'english', 'dev').texts[0]}!"
    text.write_text(novel, encoding="utf-8")
    run(monkeypatch, prepare_text, output, "--data", data, "--text", text)
    assert "2 sentences left out" in capsys.readouterr().out
    train = PackedSpeech(data / "english", "train").texts
    assert output.read_text(encoding="utf-8").splitlines() == ["it isn't late and left", *train]


@pytest.mark.usefixtures("examples")
def test_clips_become_longer():
    from train_english import CurriculumSampler, Schedule

    durations = np.random.default_rng(0).uniform(1.0, 17.0, size=200)
    schedule = Schedule(90)
    sampler = CurriculumSampler(durations, schedule)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 90
    longest = [durations[batch].max() for batch in batches]
    assert max(longest[:3]) <= 2.5
    assert max(longest[30:]) > 15.0
    for batch, duration in zip(batches, longest, strict=True):
        assert len(batch) == 1 or len(batch) * duration <= 40.0
    assert list(sampler) == batches


@pytest.mark.usefixtures("examples")
def test_averaged_weights(tmp_path):
    from safetensors.torch import save_file
    from train_english import average_checkpoints

    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"weight": torch.full((2,), float(step**2))}, folder / "model.safetensors")
    assert average_checkpoints(tmp_path)["weight"].tolist() == pytest.approx([14 / 3] * 2)


@pytest.mark.usefixtures("examples")
def test_tempo_changes_the_length():
    from cached_speech import change_tempo

    features = torch.arange(11.0)[:, None].repeat(1, 3)
    assert torch.equal(change_tempo(features, 1.0), features)
    slower = change_tempo(features, 0.5)
    assert slower.shape == (22, 3)
    assert slower[0, 0] == 0.0
    assert slower[-1, 0] == 10.0

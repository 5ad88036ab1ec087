"""Tests of checkpoints between stock transformers and this package, in both directions, and of the registration."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from conftest import encoder_fields, noise, run_program, run_stock, tiny_tokenizer
from packaging.version import Version
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForCTC,
    AutoModelForRNNT,
    AutoModelForTDT,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import transformers_parakeet as tp
from transformers_parakeet.registration import register

AUTO = {"ctc": AutoModelForCTC, "rnnt": AutoModelForRNNT, "tdt": AutoModelForTDT}
MODELS = {"ctc": tp.ParakeetForCTC, "rnnt": tp.ParakeetForRNNT, "tdt": tp.ParakeetForTDT}
CONFIGS = {"ctc": tp.ParakeetCTCConfig, "rnnt": tp.ParakeetRNNTConfig, "tdt": tp.ParakeetTDTConfig}

# writes a checkpoint with stock transformers; biases that favour the blank and short durations make a random transducer
# emit a realistic number of tokens
WRITE = """
import sys, torch, numpy as np, json
import transformers as t
kind, folder, fields, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
tokenizer = t.ParakeetTokenizer.from_pretrained(tokens)
named = {} if kind == "ctc" else {"decoder_type": kind}
processor = t.ParakeetProcessor(t.ParakeetFeatureExtractor(), tokenizer, **named)
torch.manual_seed(3)
extra = {} if kind == "ctc" else dict(blank_token_id=len(tokenizer) - 1, decoder_hidden_size=24, num_decoder_layers=2)
config = getattr(t, f"Parakeet{kind.upper()}Config")(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
                                                     encoder_config=fields, **extra)
model = getattr(t, f"ParakeetFor{kind.upper()}")(config).eval()
clip = np.load(folder + "/clip.npy")
batch = processor([clip], sampling_rate=16000)
inputs = dict(batch)
with torch.no_grad():
    if kind != "ctc":
        model.joint.head.bias[len(tokenizer) - 1] += 1.5 if kind == "tdt" else 2.5
        if kind == "tdt":
            model.joint.head.bias[len(tokenizer)] -= 4.0
        model.joint.head.bias[len(tokenizer):] -= 50.0
        model.generation_config.decoder_start_token_id = config.blank_token_id
        inputs["decoder_input_ids"] = torch.tensor([[config.blank_token_id, 5, 9, 7]])
    logits = model(**inputs).logits
    out = model.generate(**batch, return_dict_in_generate=True)
model.save_pretrained(folder); processor.save_pretrained(folder)
truth = dict(features=batch["input_features"], logits=logits, sequences=out.sequences)
torch.save({**truth, "durations": getattr(out, "durations", None)}, folder + "/stock.pt")
"""

# reads a checkpoint of ours with stock transformers and writes the logits
READ = """
import sys, torch, numpy as np, transformers as t
kind, folder = sys.argv[1:]
auto = getattr(t, f"AutoModelFor{kind.upper()}")
model, info = auto.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
assert type(model).__module__.startswith("transformers.models.parakeet"), type(model)
processor = t.AutoProcessor.from_pretrained(folder)
inputs = dict(processor([np.load(folder + "/clip.npy")], sampling_rate=16000))
truth = torch.load(folder + "/inputs.pt")
torch.testing.assert_close(inputs["input_features"], truth["input_features"], atol=4e-4, rtol=0)
with torch.no_grad():
    torch.save(model.eval()(**truth).logits, folder + "/read.pt")
"""

# the programs of stock's documentation: pipeline, generate, timestamps, training; {head} is CTC, RNNT or TDT
PROGRAM = """
import json, sys
import numpy as np
from transformers import AutoModelFor{head}, AutoProcessor, pipeline
folder, results = sys.argv[1], {}
clip = np.load(folder + "/clip.npy")

pipe = pipeline("automatic-speech-recognition", model=folder)
results["pipeline"] = pipe(clip)["text"]

processor = AutoProcessor.from_pretrained(folder)
model = AutoModelFor{head}.from_pretrained(folder, dtype="auto", device_map="cpu")
inputs = processor([clip], sampling_rate=processor.feature_extractor.sampling_rate)
inputs.to(model.device, dtype=model.dtype)
outputs = model.generate(**inputs)
results["generate"] = processor.batch_decode(getattr(outputs, "sequences", outputs), skip_special_tokens=True)

if "{head}" != "CTC":
    output = model.generate(**inputs, return_dict_in_generate=True)
    results["timestamps"] = processor.decode(output.sequences, durations=output.durations, skip_special_tokens=True)

# stock's RNN-T loss needs torchaudio
if "{head}" != "RNNT":
    inputs = processor([clip], text=["the quick brown fox"], sampling_rate=16000)
    outputs = model(**inputs)
    outputs.loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    results["training"] = [float(outputs.loss), norm]

print(json.dumps(results))
"""


@pytest.fixture(scope="module", params=["ctc", "rnnt", "tdt"])
def stock_folder(request, tmp_path_factory):
    """Write a checkpoint with stock transformers, and what stock computes from it; give the head and the folder."""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    tiny_tokenizer(kind).save_pretrained(folder / "tokens")
    np.save(folder / "clip.npy", noise(4.0))
    run_stock(WRITE, kind, folder, json.dumps(encoder_fields()), folder / "tokens")
    return kind, folder


def tokens_and_frames(sequence, durations, blank_id):
    """Return (token, frame) of every token of a decoded sequence, without blanks."""
    frames = durations.cumsum(0) - durations
    return [(int(token), int(frame)) for token, frame in zip(sequence, frames, strict=True) if token != blank_id]


def test_stock_checkpoints_load_into_our_classes(stock_folder):
    kind, folder = stock_folder
    truth = torch.load(folder / "stock.pt")
    assert type(AutoConfig.from_pretrained(folder)) is CONFIGS[kind]
    assert type(AutoModel.from_pretrained(folder)) is MODELS[kind]
    assert type(AutoFeatureExtractor.from_pretrained(folder)) is tp.ParakeetFeatureExtractor
    assert type(AutoTokenizer.from_pretrained(folder)) is tp.ParakeetTokenizer
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is tp.ParakeetProcessor
    model, info = AUTO[kind].from_pretrained(folder, output_loading_info=True)
    assert type(model) is MODELS[kind]
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = dict(processor([np.load(folder / "clip.npy")], sampling_rate=16000))
    # FLOAT32_ERROR in test_feature_extraction.py, on both sides; measured 2.2e-6
    torch.testing.assert_close(inputs["input_features"], truth["features"], atol=4e-4, rtol=0)
    inputs["input_features"] = truth["features"]
    extra = {} if kind == "ctc" else {"decoder_input_ids": torch.tensor([[model.config.blank_token_id, 5, 9, 7]])}
    with torch.no_grad():
        logits = model.eval()(**inputs, **extra).logits
    frames = int(model._get_subsampling_output_length(inputs["attention_mask"].sum()))
    torch.testing.assert_close(logits[:, :frames], truth["logits"][:, :frames], atol=1e-5, rtol=1e-5)
    out = model.generate(**inputs, return_dict_in_generate=True)
    if kind == "ctc":
        assert out.sequences.tolist() == truth["sequences"].tolist()
    else:
        blank_id = model.config.blank_token_id
        expected = tokens_and_frames(truth["sequences"][0], truth["durations"][0], blank_id)
        assert len(expected) > 3
        assert tokens_and_frames(out.sequences[0], out.durations[0], blank_id) == expected


def test_pipeline_loads_a_stock_folder(stock_folder):
    kind, folder = stock_folder
    pipe = pipeline("automatic-speech-recognition", model=str(folder))
    assert type(pipe) is tp.ParakeetASRPipeline
    assert type(pipe.model) is MODELS[kind]
    model, processor = pipe.model, AutoProcessor.from_pretrained(folder)
    clip = np.load(folder / "clip.npy")
    generated = model.generate(**processor([clip], sampling_rate=16000))
    expected = processor.batch_decode(getattr(generated, "sequences", generated), skip_special_tokens=True)[0]
    assert pipe(clip)["text"] == expected
    assert len(expected) > 10


def test_a_program_written_for_stock_runs_unchanged(stock_folder):
    kind, folder = stock_folder
    program = PROGRAM.replace("{head}", kind.upper())
    # stock's times in seconds have rounding errors such as 3.7600000000000002
    stock, ours = (
        json.loads(printed, parse_float=lambda number: round(float(number), 6))
        for printed in (run_stock(program, folder), run_program("import transformers_parakeet\n" + program, folder))
    )
    assert len(stock["generate"][0]) > 10
    # gradients of the same loss, summed in another order
    assert ours.pop("training", []) == pytest.approx(stock.pop("training", []), rel=1e-4)
    if Version(transformers.__version__) < Version("5.23"):
        # the pipeline of stock before 5.23 drops the attention mask and decodes padding, so compare with `generate`
        stock["pipeline"] = stock["generate"][0]
    assert ours == stock


def test_our_checkpoints_load_into_stock(stock_folder, tmp_path):
    kind, folder = stock_folder
    model, processor = MODELS[kind].from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clip = np.load(folder / "clip.npy")
    np.save(tmp_path / "clip.npy", clip)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [MODELS[kind].__name__]
    assert not {"auto_map", "custom_pipelines"} & config.keys()
    inputs = dict(processor([clip], sampling_rate=16000))
    if kind != "ctc":
        inputs["decoder_input_ids"] = torch.tensor([[model.config.blank_token_id, 5, 9, 7]])
    torch.save(inputs, tmp_path / "inputs.pt")
    run_stock(READ, kind, tmp_path)
    with torch.no_grad():
        logits = model(**inputs).logits
    frames = int(model._get_subsampling_output_length(inputs["attention_mask"].sum()))
    torch.testing.assert_close(logits[:, :frames], torch.load(tmp_path / "read.pt")[:, :frames], atol=1e-5, rtol=1e-5)


def test_class_names_in_transformers_refer_to_our_classes():
    import transformers.models.parakeet as package

    for name in ("ParakeetForCTC", "ParakeetForTDT", "ParakeetProcessor", "ParakeetEncoderConfig"):
        assert getattr(transformers, name) is getattr(tp, name)
        assert getattr(package, name) is getattr(tp, name)


def test_registering_twice_changes_nothing():
    from transformers.pipelines import PIPELINE_REGISTRY

    task = PIPELINE_REGISTRY.supported_tasks["automatic-speech-recognition"]
    before = dict(task)
    register()
    assert task == before
    assert task["pt"].count(AutoModelForRNNT) == 1


def test_other_model_families_keep_their_classes():
    from transformers import NemotronAsrStreamingConfig, Wav2Vec2Config

    for config in (Wav2Vec2Config, NemotronAsrStreamingConfig):
        assert AutoConfig.for_model(config.model_type).__class__.__module__.startswith("transformers.")


def test_the_import_loads_no_optional_package_that_stock_does_not_load():
    optional = {"soundfile", "av", "soxr", "typer", "rich", "jiwer", "peft", "datasets", "librosa", "sentencepiece"}
    report = f"; import json, sys; print(json.dumps(sorted({optional} & sys.modules.keys())))"
    stock = run_stock("from transformers import ParakeetForCTC, ParakeetProcessor, pipeline" + report)
    program = "import transformers_parakeet" + report
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert set(json.loads(done.stdout)) <= set(json.loads(stock))

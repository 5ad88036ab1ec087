"""Runs programs written for stock transformers with and without this package, each time in a separate process.

A program that runs without this package must run with it and give the same numbers.
"""

import json
import re
import textwrap
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
from conftest import encoder_fields, noise, run_program, run_stock, tiny_tokenizer

# writes a checkpoint of each kind of head with stock transformers
WRITE = """
import json, sys, torch
import transformers as t
folder, fields = sys.argv[1], json.loads(sys.argv[2])
for kind in ("ctc", "rnnt", "tdt"):
    tokenizer = t.ParakeetTokenizer.from_pretrained(f"{folder}/tokens_{kind}")
    named = {} if kind == "ctc" else {"decoder_type": kind}
    processor = t.ParakeetProcessor(t.ParakeetFeatureExtractor(), tokenizer, **named)
    torch.manual_seed(3)
    extra = {} if kind == "ctc" else {"blank_token_id": len(tokenizer) - 1, "decoder_hidden_size": 24}
    config = getattr(t, f"Parakeet{kind.upper()}Config")(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, encoder_config=fields, **extra)
    model = getattr(t, f"ParakeetFor{kind.upper()}")(config).eval()
    for layer in model.encoder.layers:
        layer.conv.norm.running_mean.normal_(0, 0.1)
        layer.conv.norm.running_var.uniform_(0.5, 1.5)
    if kind != "ctc":
        with torch.no_grad():
            model.joint.head.bias[len(tokenizer) - 1] += 1.5 if kind == "tdt" else 2.5
            # stock's TDT has no limit on the labels of a frame: never choose duration 0
            model.joint.head.bias[len(tokenizer):len(tokenizer) + 1] -= 50.0
        model.generation_config.decoder_start_token_id = config.blank_token_id
        model.generation_config.suppress_tokens = list(range(len(tokenizer), model.joint.head.out_features)) or None
    model.save_pretrained(f"{folder}/{kind}")
    processor.save_pretrained(f"{folder}/{kind}")
"""

# helpers of the programs: a model, a batch of two clips, texts, losses and gradients
START = """
import copy, io, json, sys, tempfile, traceback, warnings, zlib
import numpy as np, torch
from importlib.util import find_spec
from torch.nn.utils import parametrizations, prune
from transformers import AutoModelForCTC, AutoModelForRNNT, AutoModelForTDT, AutoProcessor
warnings.simplefilter("ignore")
torch.set_num_threads(1)
folder, kind = sys.argv[1:]
auto = {"ctc": AutoModelForCTC, "rnnt": AutoModelForRNNT, "tdt": AutoModelForTDT}[kind]
processor = AutoProcessor.from_pretrained(f"{folder}/{kind}")
clips = [np.load(f"{folder}/long.npy"), np.load(f"{folder}/short.npy")]
batch = dict(processor(clips, sampling_rate=16000))
with_labels = dict(processor(clips, text=["the quick brown fox", "she sells"], sampling_rate=16000))

def load():
    return auto.from_pretrained(f"{folder}/{kind}").eval()

def text(model):
    texts = []
    # one clip at a time: in a batch stock's TDT continues after the end of the shorter clip
    for clip in clips:
        limit = {} if kind == "ctc" else {"max_new_tokens": 60}
        out = model.generate(**processor([clip], sampling_rate=16000), **limit)
        texts += processor.batch_decode(getattr(out, "sequences", out), skip_special_tokens=True)
    return texts

# stock's RNN-T loss needs torchaudio, so that RNN-T models use a function of the encoder's output instead
def loss(model):
    if kind == "rnnt":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.get_audio_features(**batch).pooler_output[0].square().mean()
    return model(**with_labels).loss

def gradients(model):
    loss(model).backward()
    return norms_of_gradients(model)

def norms_of_gradients(model):
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}

# adapters whose weights depend on their names only
def adapted(targets, rank=4):
    from peft import LoraConfig, get_peft_model
    model = get_peft_model(load(), LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.split("encoder.")[-1].encode()))
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()

programs, results = {}, {}
def program(function):
    programs[function.__name__] = function
    return function
"""

PROGRAMS = """
@program
def plain():
    return text(load()), float(loss(load()))

@program
def adapters_on_pointwise_convolutions():
    model = adapted(["pointwise_conv1", "pointwise_conv2"])
    return text(model), gradients(model)

@program
def adapters_on_other_layers():
    targets = ["depthwise_conv", "subsampling.linear", "linear1"]
    heads = {"ctc": ["ctc_head"], "rnnt": [], "tdt": ["joint.head"]}[kind]
    # peft requires a rank that is a multiple of the groups of a convolution
    model = adapted(targets + heads, rank=32)
    return text(model), gradients(model)

@program
def adapters_on_the_subsampling():
    model = adapted([f"subsampling.layers.{n}" for n in (0, 2, 3, 6)], rank=16)
    # without a mask, because stock does not mask the output of a convolution with an adapter
    encoded = model.base_model.model.encoder(input_features=batch["input_features"]).last_hidden_state
    encoded.square().mean().backward()
    return float(encoded.abs().mean()), norms_of_gradients(model)

@program
def merged_adapters():
    model = adapted(["pointwise_conv1", "linear2"])
    before = text(model)
    return before, text(model.merge_and_unload())

@program
def forward_hooks():
    model, seen = load(), {}
    clip = dict(processor(clips[:1], sampling_rate=16000))
    def keep(name):
        def hook(module, inputs, output):
            if isinstance(output, torch.Tensor) and name not in seen:
                seen[name] = output
        return hook
    names = ["conv.pointwise_conv1", "conv.depthwise_conv", "conv.norm", "conv.pointwise_conv2", "conv.activation",
             "feed_forward1.linear1", "feed_forward1.activation"]
    names = [f"encoder.layers.{layer}.{name}" for layer in (0, 1) for name in names]
    names += [f"encoder.subsampling.layers.{n}" for n in range(8)] + ["encoder.subsampling.linear"]
    for name in names:
        model.get_submodule(name).register_forward_hook(keep(name))
    model.generate(**clip)

    # frames near the end depend on the padding, which the two mask at different layers
    def mean(name, output):
        if name.endswith("activation") and "conv" in name:
            return None
        if output.ndim == 4:
            output = output[:, :, :60]
        elif ".conv." in name:
            output = output[..., :20]
        else:
            output = output[:, :20]
        return float(output.abs().mean())
    return {name: mean(name, output) for name, output in seen.items()}

@program
def hooks_of_the_prediction_network():
    if kind == "ctc":
        return None
    model, calls = load(), []
    model.decoder.lstm.register_forward_hook(lambda *_: calls.append("lstm"))
    model.joint.head.register_forward_hook(lambda *_: calls.append("head"))
    return text(model), sorted(set(calls))

@program
def a_hook_that_changes_a_module():
    model = load()
    model.encoder.layers[0].conv.pointwise_conv1.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    model.encoder.layers[1].conv.norm.register_forward_hook(lambda module, inputs, output: output + 0.2)
    return text(model), float(loss(model))

@program
def backward_hooks():
    model, norms = load(), {}
    for name in ("pointwise_conv1", "depthwise_conv", "pointwise_conv2"):
        module = model.encoder.layers[1].conv.get_submodule(name)
        module.register_full_backward_hook(lambda m, i, o, name=name: norms.__setitem__(name, float(o[0].norm())))
    loss(model).backward()
    return norms

@program
def offloading_to_memory():
    from accelerate import cpu_offload
    model = load()
    cpu_offload(model, execution_device="cpu")
    return text(model), float(loss(model))

@program
def offloading_to_disk():
    from accelerate import disk_offload
    model = load()
    with tempfile.TemporaryDirectory() as directory:
        disk_offload(model, directory, execution_device="cpu")
        return text(model), float(loss(model))

@program
def weights_in_int8_by_torchao():
    if find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    model = load()
    quantize_(model, Int8WeightOnlyConfig())
    with torch.no_grad():
        return text(model), float(loss(model))

@program
def dynamic_quantisation():
    model = torch.ao.quantization.quantize_dynamic(load(), {torch.nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert isinstance(text(model)[0], str)
        return float(model.encoder(**batch).last_hidden_state[:, :12].abs().mean())

@program
def parametrised_weights():
    model = load()
    with torch.no_grad():
        for layer in model.encoder.layers:
            parametrizations.weight_norm(layer.conv.pointwise_conv1)
            layer.conv.pointwise_conv1.parametrizations.weight.original0.mul_(0.7)
            parametrizations.weight_norm(layer.conv.depthwise_conv)
    return text(model), gradients(model)

@program
def pruned_weights():
    model = load()
    prune.l1_unstructured(model.encoder.layers[0].conv.pointwise_conv2, "weight", amount=0.5)
    prune.l1_unstructured(model.encoder.subsampling.layers[3], "weight", amount=0.3)
    return text(model), float(loss(model))

@program
def deepcopy_and_pickle():
    model = load()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return text(copy.deepcopy(model)), text(torch.load(buffer, weights_only=False))

@program
def export_of_the_encoder():
    if kind != "ctc":
        return None
    model = load()
    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model.encoder
        def forward(self, input_features, attention_mask):
            return self.encoder(input_features=input_features, attention_mask=attention_mask).last_hidden_state
    inputs = batch["input_features"], batch["attention_mask"]
    exported = torch.export.export(Encoder(), inputs, strict=False).module()(*inputs)
    with torch.no_grad():
        assert torch.allclose(exported, Encoder()(*inputs), atol=1e-4)
    return float(exported[0, :20].abs().mean())

@program
def seq2seq_trainer():
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
    if kind != "ctc":
        return None
    rows = [{name: value[0] for name, value in with_labels.items()}] * 2
    with tempfile.TemporaryDirectory() as directory:
        arguments = Seq2SeqTrainingArguments(
            directory, predict_with_generate=True, per_device_eval_batch_size=2, per_device_train_batch_size=2,
            report_to=[], use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-4, seed=3)
        trainer = Seq2SeqTrainer(model=load(), args=arguments, train_dataset=rows, eval_dataset=rows,
                                 compute_metrics=lambda p: {"sum": float(p.predictions.sum())})
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    return [before["eval_loss"], before["eval_sum"], after["eval_loss"]]

@program
def gradient_checkpointing():
    model = load().train()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    return gradients(model)
"""

FINISH = """
for name, function in programs.items():
    try:
        results[name] = {"result": function()}
    except Exception:
        results[name] = {"error": traceback.format_exc()[-1500:]}
print("RESULTS" + json.dumps(results))
"""

# kind of head and name of each program that also fails without this package
FAILS_ON_STOCK: set[tuple[str, str]] = set()

NAMES = re.findall(r"^def (\w+)", PROGRAMS, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a checkpoint of each kind of head, written by stock transformers, and two clips."""
    folder = tmp_path_factory.mktemp("stock")
    for kind in ("ctc", "rnnt", "tdt"):
        tiny_tokenizer(kind).save_pretrained(folder / f"tokens_{kind}")
    np.save(folder / "long.npy", noise(2.5))
    np.save(folder / "short.npy", noise(1.3, seed=1))
    run_stock(WRITE, folder, json.dumps(encoder_fields(dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)))
    return folder


@pytest.fixture(scope="module")
def outcomes(folder):
    """Return a function of the kind of head that runs all programs once without and once with this package."""

    @cache
    def run(kind):
        program = textwrap.dedent(START + PROGRAMS + FINISH)
        with ThreadPoolExecutor() as pool:
            stock = pool.submit(run_stock, program, folder, kind)
            ours = pool.submit(run_program, "import transformers_parakeet\n" + program, folder, kind)
        return [json.loads(printed.result().partition("RESULTS")[2]) for printed in (stock, ours)]

    return run


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["ctc", "rnnt", "tdt"])
def test_a_program_gives_the_same_results_as_on_stock_transformers(kind, name, outcomes):
    stock, ours = (results[name] for results in outcomes(kind))
    if (kind, name) in FAILS_ON_STOCK:
        assert "error" in stock
        return
    assert "error" not in stock, stock["error"]
    assert "error" not in ours, ours["error"]
    compare(ours["result"], stock["result"], name)


def compare(ours, stock, path):
    """Compare two results read from JSON, numbers up to the rounding of float32 sums; `path` names them in errors."""
    if isinstance(stock, dict):
        assert stock.keys() <= ours.keys(), f"{path}: {sorted(stock.keys() - ours.keys())} missing"
        for key, value in stock.items():
            compare(ours[key], value, f"{path}, {key}")
    elif isinstance(stock, list):
        assert len(ours) == len(stock), path
        for index, value in enumerate(stock):
            compare(ours[index], value, f"{path}, {index}")
    elif isinstance(stock, float):
        # measured: 4e-5; in int8 one step of the quantised activations
        tolerance = 2e-2 if path.startswith("dynamic_quantisation") else 5e-4
        assert ours == pytest.approx(stock, rel=tolerance, abs=1e-6), path
    else:
        assert ours == stock, path


# a program that imports names from transformers before it imports this package
LATE = """
from transformers import ParakeetForTDT, ParakeetProcessor, pipeline
import IMPORT
import json, sys
import numpy as np
folder = f"{sys.argv[1]}/tdt"
model, processor = ParakeetForTDT.from_pretrained(folder), ParakeetProcessor.from_pretrained(folder)
clip = np.load(f"{sys.argv[1]}/long.npy")
output = model.generate(**processor([clip], sampling_rate=16000))
pipe = pipeline("automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
                feature_extractor=processor.feature_extractor, device="cpu")
print(json.dumps({"generate": processor.batch_decode(output.sequences, skip_special_tokens=True), "pipe": pipe(clip),
                  "instance": isinstance(model, ParakeetForTDT)}))
"""


def test_a_class_imported_from_transformers_first_works_as_in_stock(folder):
    stock = json.loads(run_stock(LATE.replace("IMPORT", "json"), folder))
    assert len(stock["pipe"]["text"]) > 5
    ours = run_program(LATE.replace("IMPORT", "transformers_parakeet"), folder)
    assert json.loads(ours) == stock


def test_a_warning_says_what_to_import_first(folder):
    program = LATE.replace(
        "IMPORT", "transformers_parakeet, transformers; transformers.logging.set_verbosity_warning()"
    )
    program += "\nsys.exit(3)"
    printed, errors = run_program(program, folder, status=3)
    assert json.loads(printed)["instance"]
    assert "Import transformers_parakeet first to get timestamps and chunked inference with every head." in errors

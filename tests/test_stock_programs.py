"""Programs written for stock transformers, each run with and without our import in processes of their own.

What passes on stock passes on ours, with the same numbers.
"""

import json

import numpy as np
import pytest
from conftest import encoder_fields, noise, run_program, run_stock, tiny_tokenizer

# writes a folder of each head with stock transformers
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
            model.joint.head.bias[len(tokenizer):] -= 4.0
        model.generation_config.decoder_start_token_id = config.blank_token_id
        model.generation_config.suppress_tokens = list(range(len(tokenizer), model.joint.head.out_features)) or None
    model.save_pretrained(f"{folder}/{kind}")
    processor.save_pretrained(f"{folder}/{kind}")
"""

# what every program begins with: a model of one head, a batch of two clips, and what is compared
START = """
import copy, json, sys, tempfile
import numpy as np, torch
torch.set_num_threads(1)
from transformers import AutoModelForCTC, AutoModelForRNNT, AutoModelForTDT, AutoProcessor, pipeline
folder, kind = sys.argv[1:]
auto = {"ctc": AutoModelForCTC, "rnnt": AutoModelForRNNT, "tdt": AutoModelForTDT}[kind]
model = auto.from_pretrained(f"{folder}/{kind}").eval()
processor = AutoProcessor.from_pretrained(f"{folder}/{kind}")
clips = [np.load(f"{folder}/long.npy"), np.load(f"{folder}/short.npy")]
batch = dict(processor(clips, sampling_rate=16000))
with_labels = dict(processor(clips, text=["the quick brown fox", "she sells"], sampling_rate=16000))

def tokens(model):
    out = model.generate(**batch)
    return processor.batch_decode(getattr(out, "sequences", out), skip_special_tokens=True)

# stock's RNN-T loss needs torchaudio: there the encoder's output takes the place of the loss
def loss_of(model):
    if kind == "rnnt":
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return base.get_audio_features(**batch).pooler_output[0].square().mean()
    return model(**with_labels).loss

def gradients(model):
    return {name: float(p.grad.norm()) for name, p in model.named_parameters() if p.grad is not None}

def show(**results):
    print(json.dumps(results))
"""

PROGRAMS = {
    "deepcopy": """
        other = copy.deepcopy(model)
        model.train()
        show(text=tokens(other), training=other.training)
    """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of the three heads as stock writes them, and two clips."""
    folder = tmp_path_factory.mktemp("stock")
    for kind in ("ctc", "rnnt", "tdt"):
        tiny_tokenizer(kind).save_pretrained(folder / f"tokens_{kind}")
    np.save(folder / "long.npy", noise(2.5))
    np.save(folder / "short.npy", noise(1.3, seed=1))
    run_stock(WRITE, folder, json.dumps(encoder_fields(dropout=0.0, activation_dropout=0.0, attention_dropout=0.0)))
    return folder


# the import comes after a program took names from transformers
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


def test_a_name_taken_before_the_import_works_as_in_stock(folder):
    stock = json.loads(run_stock(LATE.replace("IMPORT", "json"), folder))
    assert len(stock["pipe"]["text"]) > 5
    ours = run_program(LATE.replace("IMPORT", "transformers_parakeet"), folder)
    assert json.loads(ours) == stock


def test_the_user_is_told_what_to_import_first(folder):
    program = LATE.replace(
        "IMPORT", "transformers_parakeet, transformers; transformers.logging.set_verbosity_warning()"
    )
    program += "\nsys.exit(3)"
    printed, errors = run_program(program, folder, status=3)
    assert json.loads(printed)["instance"]
    assert "Import transformers_parakeet first for times and chunks on every head." in errors

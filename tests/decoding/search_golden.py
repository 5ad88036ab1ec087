"""The golden cases of the searches: NeMo's settings and n-best lists, and the golden models and clips."""

import json
from functools import cache
from typing import Any

import soundfile
import torch
from conftest import TESTS
from torch import Tensor

import transformers_parakeet as tp
from transformers_parakeet import ParakeetProcessor
from transformers_parakeet.decoding import Fusion, build_fusion

GOLDEN = TESTS / "golden"
SEARCH = GOLDEN / "search"
TRANSDUCERS, CTC_MODELS = ("transducer", "tdt_v3"), ("ctc", "hybrid_tdt_ctc")
# the blank of all golden models is the last token
BLANK = 96


@cache
def read_golden(name: str) -> dict[str, Any]:
    """Read the file of a model: its clips, phrases and cases."""
    return json.loads((SEARCH / f"{name}.json").read_text("utf-8"))


def list_cases(models: tuple[str, ...], prefix: str) -> list[tuple[str, str]]:
    """List the pairs of a model and one of its cases whose name has a prefix."""
    return [(name, case) for name in models for case in read_golden(name)["cases"] if case.startswith(prefix)]


@cache
def load_golden_model(name: str) -> tuple[Any, ParakeetProcessor]:
    """Load a model and its processor."""
    model, processor = tp.load_nemo(GOLDEN / "real_configs" / name / "model.nemo")
    return model.eval(), processor


@cache
def encode_clips(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor, Tensor]:
    """Encode the clips of a model as one batch.

    Returns:
        The model in the type `dtype`, the (B, N, H) encoder frames, and the (B,) number of frames.
    """
    model, processor = load_golden_model(name)
    if dtype != torch.float32:
        model = tp.load_nemo(GOLDEN / "real_configs" / name / "model.nemo")[0].to(dtype).eval()
    folders = {clip: "streaming" if clip == "second" else "real_configs" for clip in read_golden(name)["clips"]}
    paths = [GOLDEN / folder / "clips" / f"{clip}.wav" for clip, folder in folders.items()]
    audio = [soundfile.read(path, dtype="float32")[0] for path in paths]
    inputs = processor(audio, sampling_rate=16000, return_tensors="pt")
    with torch.no_grad():
        outputs = model.encoder(inputs["input_features"].to(dtype), attention_mask=inputs["attention_mask"])
    return model, outputs.last_hidden_state, outputs.attention_mask.sum(-1)


def build_golden_fusion(name: str, settings: dict[str, Any]) -> Fusion | None:
    """Load the language model and build the boosting tree of a case.

    Args:
        name: the model.
        settings: the settings of NeMo under `greedy` or `beam`.
    """
    processor = load_golden_model(name)[1]
    language_model = boosting = None
    if "ngram_lm_model" in settings:
        language_model = processor.load_language_model(SEARCH / settings["ngram_lm_model"])
    if "boosting_tree" in settings:
        tree = dict(settings["boosting_tree"])
        assert tree.pop("unk_score", 0.0) == 0.0
        boosting = processor.boosting_tree(read_golden(name)["phrases"], alternatives=False, **tree)
    weights = settings.get("ngram_lm_alpha", 0.0), settings.get("boosting_tree_alpha", 0.0)
    return build_fusion(language_model, weights[0], boosting, weights[1], BLANK, BLANK + 1)

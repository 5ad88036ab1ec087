"""Models with 4 mel frames per encoder frame: training, times, saving, stock transformers, and NeMo files."""

import json

import numpy as np
import pytest
import torch
from conftest import noise, run_stock
from training_helpers import HEADS, create_model, record_warnings, sentence_rows

import transformers_parakeet as tp
from transformers_parakeet.nemo import convert_checkpoint
from transformers_parakeet.training import SpeechCollator
from transformers_parakeet.transcription import load_pipeline, transcribe

FACTOR = 4
FRAME_S = FACTOR * 0.01

STOCK_TOKENS = """
    import json, sys
    import numpy as np
    import torch
    from transformers import AutoModelForCTC, AutoModelForTDT, AutoProcessor

    folder, head, clip = sys.argv[1:]
    model = (AutoModelForCTC if head == "ctc" else AutoModelForTDT).from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor([np.load(clip)], sampling_rate=16000)
    if head == "ctc":
        print(json.dumps(model(**inputs).logits.argmax(-1)[0].tolist()))
    else:
        output = model.generate(**inputs, return_dict_in_generate=True)
        durations = output.durations[0]
        print(json.dumps([output.sequences[0].tolist(), durations.tolist()]))
"""


def build(head):
    model, processor = create_model(head, encoder={"subsampling_factor": FACTOR})
    return model.eval(), tp.ParakeetProcessor(
        processor.feature_extractor,
        processor.tokenizer,
        decoder_type=processor.decoder_type,
        subsampling_factor=FACTOR,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a model of each head, whose processor was saved with and without its factor."""
    root = tmp_path_factory.mktemp("models")
    for head in HEADS:
        model, processor = build(head)
        model.save_pretrained(root / head)
        processor.save_pretrained(root / head)
    return root


@pytest.mark.parametrize("head", HEADS)
def test_encoder_has_a_frame_per_four_mel_frames(head):
    model, processor = build(head)
    inputs = processor([noise(2.0)])
    hidden = model.encoder(**inputs).last_hidden_state
    assert hidden.shape[1] == -(-inputs["input_features"].shape[1] // FACTOR)


def test_processor_has_the_factor_of_the_model(folders):
    folder = folders / "tdt"
    processor = tp.ParakeetProcessor.from_pretrained(folder)
    assert processor.subsampling_factor == FACTOR
    assert processor.frame_duration_s == FRAME_S
    # a processor that was saved without the factor takes it from the model config in the same folder
    path = folder / "processor_config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    assert fields["subsampling_factor"] == FACTOR
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "subsampling_factor"}))
    try:
        assert tp.ParakeetProcessor.from_pretrained(folder).subsampling_factor == FACTOR
    finally:
        path.write_text(json.dumps(fields), encoding="utf-8")
    # a processor with the usual factor is saved as that of stock transformers
    _, usual = create_model("tdt")
    assert usual.subsampling_factor == 8
    assert "subsampling_factor" not in usual.to_dict()


@pytest.mark.parametrize("head", HEADS)
def test_times_count_frames_of_40_ms(folders, head):
    samples = noise(3.0)
    pipeline = load_pipeline(folders / head, dtype="float32")
    result = next(transcribe([samples], pipeline))
    inputs = pipeline.processor([samples])
    output = pipeline.model.generate(**inputs, return_dict_in_generate=True)
    frames = output.hypotheses.to_lists(0)["frames"]
    assert len(frames) > 3
    if head in ("tdt", "hybrid"):
        assert [token.start for token in result.tokens] == pytest.approx([FRAME_S * frame for frame in frames])
        # `decode` of the processor gives the same times
        _, times = pipeline.processor.decode(output.sequences, durations=output.durations)
        assert [entry["start"] for entry in times[0]] == [token.start for token in result.tokens if token.text]
        _, times = pipeline.processor.decode(output.sequences, durations=output.durations, subsampling_factor=8)
        assert times[0][-1]["start"] == pytest.approx(2 * FRAME_S * frames[-1])
    assert max(token.end for token in result.tokens) <= result.duration + 8 * FRAME_S


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_stock_transformers_computes_the_same_tokens(folders, head, tmp_path):
    samples = noise(3.0)
    np.save(tmp_path / "clip.npy", samples)
    stock = json.loads(run_stock(STOCK_TOKENS, folders / head, head, tmp_path / "clip.npy").splitlines()[-1])
    model_class = tp.ParakeetForCTC if head == "ctc" else tp.ParakeetForTDT
    model = model_class.from_pretrained(folders / head).eval()
    inputs = tp.ParakeetProcessor.from_pretrained(folders / head)([samples])
    if head == "ctc":
        with torch.no_grad():
            assert model(**inputs).logits.argmax(-1)[0].tolist() == stock
    else:
        output = model.generate(**inputs, return_dict_in_generate=True)
        ours = [output.sequences[0].tolist(), output.durations[0].tolist()]
        length = min(len(ours[0]), len(stock[0]))
        assert length > 5
        assert [row[:length] for row in ours] == [row[:length] for row in stock]


@pytest.mark.parametrize("head", HEADS)
def test_nemo_file_keeps_the_factor_and_the_outputs(folders, head, tmp_path):
    convert_checkpoint(folders / head, tmp_path / "model.nemo")
    model, processor = tp.load_nemo(tmp_path / "model.nemo")
    assert model.config.encoder_config.subsampling_factor == FACTOR
    assert processor.subsampling_factor == FACTOR
    original, _ = build(head)
    inputs = processor([noise(2.0)])
    with torch.no_grad():
        expected = original.encoder(**inputs).last_hidden_state
        assert torch.equal(model.encoder(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_model_learns(head):
    model, processor = build(head)
    model.train()
    batch = SpeechCollator(processor, dither=0.0)(sentence_rows()[:4])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_collator_counts_frames_of_the_model(monkeypatch):
    texts = record_warnings(monkeypatch, "collator")
    row = {**sentence_rows()[0], "labels": [5, 6] * 18}
    num_mel_frames = row["duration"] * 100
    assert num_mel_frames / 8 < 36 < num_mel_frames / FACTOR
    for factor, num_warnings in ((FACTOR, 0), (8, 1)):
        _, processor = create_model("ctc")
        processor = tp.ParakeetProcessor(processor.feature_extractor, processor.tokenizer, subsampling_factor=factor)
        texts.clear()
        SpeechCollator(processor, dither=0.0)([row])
        assert len([text for text in texts if "encoder frames" in text]) == num_warnings

"""Checks the processor and the tokenizer: labels, decoding, times, and offsets for stock tools."""

import copy
import json
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import noise, tiny_tokenizer
from transformers import AutoProcessor, TextStreamer, pipeline

import transformers_parakeet as tp


def processor(kind):
    """Return a processor with a tiny tokenizer."""
    return tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tiny_tokenizer(kind), decoder_type=kind)


def test_text_becomes_labels_and_the_decoder_input_of_transducers():
    clips, texts = [noise(1.0), noise(0.5)], ["the fox", ""]
    ctc = processor("ctc")(audio=clips, text=texts, sampling_rate=16000)
    assert set(ctc) == {"input_features", "attention_mask", "labels"}
    pad = processor("ctc").tokenizer.pad_token_id
    assert ctc["labels"][1].tolist() == [pad] * ctc["labels"].shape[1]
    tdt = processor("tdt")(audio=clips, text=texts, sampling_rate=16000)
    assert tdt["decoder_input_ids"][:, 0].tolist() == [processor("tdt").blank_token_id] * 2
    assert tdt["decoder_input_ids"][:, 1:].tolist() == tdt["labels"].tolist()


def test_labels_are_integers_if_all_transcripts_are_empty():
    out = processor("ctc")(audio=[noise(0.5)], text=[""], sampling_rate=16000)
    assert out["labels"].dtype == torch.long
    assert out["labels"].shape[0] == 1


def test_every_clip_needs_a_transcript():
    with pytest.raises(ValueError, match="got 2 clips and 1 transcripts"):
        processor("ctc")(audio=[noise(0.5)] * 2, text=["one"], sampling_rate=16000)


def test_arguments_reach_the_feature_extractor_and_the_tokenizer():
    tdt = processor("tdt")
    clips = [noise(1.0), noise(0.5)]
    batch = tdt(clips, ["the fox", "fox"], sampling_rate=16000, padding="max_length", max_length=32000)
    assert batch["input_features"].shape[1] == 201
    batch = tdt(clips, ["the fox", "fox"], sampling_rate=16000, audio_kwargs={"pad_to_multiple_of": 24000})
    assert batch["input_features"].shape[1] == 151
    padded = tdt(clips, ["fox", "fox"], sampling_rate=16000, text_kwargs={"padding": "max_length", "max_length": 9})
    assert padded["labels"].shape == (2, 9)


def test_an_array_with_channels_is_one_clip():
    clip = noise(0.5)
    stereo = processor("ctc")(np.stack([clip, clip]), sampling_rate=16000)
    mono = processor("ctc")([clip], sampling_rate=16000)
    torch.testing.assert_close(stereo["input_features"], mono["input_features"])


def test_ctc_merges_repeats_and_transducers_keep_them():
    token = processor("ctc").tokenizer("the", add_special_tokens=False).input_ids[0]
    assert processor("ctc").batch_decode([[token, token]]) == processor("ctc").batch_decode([[token]])
    tdt = processor("tdt")
    token = tdt.tokenizer("the", add_special_tokens=False).input_ids[0]
    assert tdt.batch_decode([[token, token]]) != tdt.batch_decode([[token]])


def test_decode_with_durations_returns_the_times_of_tokens():
    tdt = processor("tdt")
    ids = tdt.tokenizer("the fox", add_special_tokens=False).input_ids
    blank = tdt.blank_token_id
    sequence = torch.tensor([blank, blank, *ids, blank])
    durations = torch.tensor([0, 3, *[2] * len(ids), 4])
    text, times = tdt.decode(sequence, durations=durations, skip_special_tokens=True)
    assert text == "the fox"
    assert [t["start"] for t in times] == pytest.approx([0.24 + 0.16 * i for i in range(len(ids))])
    assert [t["end"] for t in times] == pytest.approx([0.40 + 0.16 * i for i in range(len(ids))])
    texts, batch = tdt.decode(sequence[None], durations=durations[None], skip_special_tokens=True)
    assert texts == [text]
    assert batch == [times]
    assert "".join(t["token"] for t in times) == text


def test_a_vocabulary_without_punctuation_leaves_the_text_unchanged(monkeypatch):
    monkeypatch.setattr(tp.ParakeetProcessor, "punctuation", frozenset())
    assert processor("ctc")._join_punctuation("shore , again .") == "shore , again ."


def test_the_space_before_punctuation_is_removed():
    ctc = processor("ctc")
    assert "," in ctc.punctuation
    assert ctc._join_punctuation("shore , again .") == "shore, again."


def test_unknown_levels_are_refused():
    from transformers_parakeet.timestamps import EmittedTokens

    with pytest.raises(ValueError, match="char, word, segment"):
        processor("ctc").chunks(EmittedTokens([], [], []), "phone")


def test_character_offsets_for_stock_tools():
    tokenizer = tiny_tokenizer()
    pad = tokenizer.pad_token_id
    the, fox = (tokenizer(word, add_special_tokens=False).input_ids for word in ("the", "fox"))
    frames = [pad, *[t for t in the for _ in range(2)], pad, pad, *fox, pad]
    out = tokenizer.decode(frames, output_char_offsets=True)
    assert out["text"] == "the fox"
    first, last = out["char_offsets"][0], out["char_offsets"][-1]
    assert first["start_offset"] == 1
    assert last["end_offset"] == len(frames) - 1
    words = tokenizer._get_word_offsets(out["char_offsets"], tokenizer.replace_word_delimiter_char)
    assert [word["word"] for word in words] == ["the", "fox"]
    assert words[1]["start_offset"] == 1 + 2 * len(the) + 2


def test_a_saved_processor_is_loaded_unchanged(tmp_path):
    saved = processor("tdt")
    saved.save_pretrained(tmp_path)
    loaded = tp.ParakeetProcessor.from_pretrained(tmp_path)
    assert loaded.decoder_type == "tdt"
    assert loaded.blank_token_id == saved.blank_token_id
    assert type(loaded.tokenizer) is tp.ParakeetTokenizer


@pytest.mark.parametrize(("kind", "text"), [("ctc", "the fox"), ("rnnt", "the the fox"), ("tdt", "the the fox")])
def test_a_streamer_keeps_the_repeats_of_a_transducer(kind, text, capsys):
    """A streamer calls the tokenizer without arguments; it merges repeats only if the vocabulary is one of CTC."""
    tokenizer = tiny_tokenizer(kind)
    the, fox = (tokenizer(word, add_special_tokens=False).input_ids for word in ("the", "fox"))
    assert len(the) == 1
    streamer = TextStreamer(tokenizer)
    for token in [*the, *the, *fox]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out.strip() == text
    assert tokenizer.decode([*the, *the], group_tokens=True) == "the"
    assert tokenizer.decode([*the, *the], group_tokens=False) == "the the"


DEMO = tp.demo_model_path()


@pytest.fixture(scope="module")
def demo():
    """Model, processor and a batch of the bundled clips."""
    processor = tp.ParakeetProcessor.from_pretrained(DEMO)
    clips = [tp.load_audio(clip) for clip in sorted((DEMO / "clips").glob("*.flac"))]
    return tp.ParakeetForTDT.from_pretrained(DEMO).eval(), processor, processor(clips, sampling_rate=16000)


@pytest.mark.parametrize("typed", [True, False])
def test_the_demo_processor_belongs_to_a_transducer(typed, tmp_path, demo):
    shutil.copytree(DEMO, tmp_path / "model")
    fields = json.loads((DEMO / "processor_config.json").read_text())
    assert fields["decoder_type"] == "tdt"
    if not typed:
        (tmp_path / "model" / "processor_config.json").write_text(json.dumps({**fields, "decoder_type": None}))
    model, _, batch = demo
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert processor.blank_token_id == model.config.blank_token_id
    output = model.generate(**batch)
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path / "model"))
    results = pipe([str(clip) for clip in sorted((DEMO / "clips").glob("*.flac"))], return_timestamps="char")
    texts, times = processor.decode(output.sequences, durations=output.durations, skip_special_tokens=True)
    assert texts == [result["text"] for result in results]
    assert times == [
        [{"token": c["text"], "start": c["timestamp"][0], "end": c["timestamp"][1]} for c in result["chunks"]]
        for result in results
    ]
    assert "decoder_input_ids" in processor([noise(1.0)], text=["one"], sampling_rate=16000)


def test_repeated_words_of_a_transducer_are_kept(demo):
    _, processor, _ = demo
    (two,) = processor.tokenizer("two", add_special_tokens=False).input_ids
    blank = processor.blank_token_id
    assert processor.batch_decode(torch.tensor([[blank, two, two, blank, two, two]])) == ["two two two two"]


def test_durations_show_that_a_sequence_is_from_a_transducer():
    untyped = tp.ParakeetProcessor(tp.ParakeetFeatureExtractor(), tiny_tokenizer("ctc"))
    the = untyped.tokenizer("the", add_special_tokens=False).input_ids[0]
    pad = untyped.tokenizer.pad_token_id
    text, times = untyped.decode(torch.tensor([pad, the, the, pad]), durations=torch.tensor([0, 2, 3, 1]))
    assert text == untyped.decode(torch.tensor([the, pad, the]))
    assert [(t["start"], t["end"]) for t in times] == [(0.0, 0.16), (0.16, 0.4)]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda ids: ids, id="as it is"),
        pytest.param(lambda ids: ids.cpu().clone(), id="copied"),
        pytest.param(list, id="a list of rows"),
        pytest.param(lambda ids: ids[:, : ids.shape[1]], id="sliced"),
    ],
)
def test_repeats_from_the_ctc_head_of_a_hybrid_are_merged(change, golden):
    model, processor = tp.load_nemo(golden / "hybrid_tdt_ctc" / "model.nemo")
    expected = json.loads((golden / "hybrid_tdt_ctc" / "expected.json").read_text())["ctc"]["single"]
    pairs = []
    for clip in ("speech0", "speech1", "synthetic"):
        samples, rate = soundfile.read(golden / "clips" / f"{clip}.wav", dtype="float32")
        batch = processor([samples], sampling_rate=rate)
        ids = change(model.generate(**batch, decoder="ctc"))
        pairs.append((processor.batch_decode(ids, skip_special_tokens=True)[0], expected[clip]["text"]))
    texts, nemo_texts = zip(*pairs, strict=True)
    assert texts == nemo_texts


def test_frame_wise_tokens_of_a_hybrid_are_saved_as_a_plain_tensor(demo, tmp_path):
    model, processor, batch = demo
    ids = model.generate(**batch, decoder="ctc")
    merged = processor.batch_decode(ids, skip_special_tokens=True)
    assert processor.batch_decode(copy.deepcopy(ids), skip_special_tokens=True) == merged
    torch.save(ids, tmp_path / "ids.pt")
    loaded = torch.load(tmp_path / "ids.pt")
    assert type(loaded) is torch.Tensor
    assert processor.batch_decode(loaded, skip_special_tokens=True, group_tokens=True) == merged

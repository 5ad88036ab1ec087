"""Checks the arguments of `generate` and of the pipeline for beam search, language models, boosting and allowed tokens.

The searches themselves are tested in `tests/decoding`.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from generation_helpers import (
    BLANK,
    DURATIONS,
    ENCODER,
    HEADS,
    PAD,
    SHARED,
    TRANSDUCERS,
    VOCAB,
    batch_of,
    build,
    run,
    tiny,
)
from search_helpers import draw_table_scorer
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from transformers_parakeet import (
    ParakeetCTCConfig,
    ParakeetForCTC,
    ParakeetForRNNT,
    ParakeetProcessor,
    ParakeetRNNTConfig,
    demo_model_path,
    load_audio,
    transcribe,
)
from transformers_parakeet.decoding import (
    BeamOptions,
    BoostedPhrase,
    TransducerOptions,
    beam_decode_ctc,
    beam_decode_transducer,
    build_boosting_tree,
    build_fusion,
)
from transformers_parakeet.pipeline_parakeet import ParakeetASRPipeline
from transformers_parakeet.transcription import load_pipeline

# scores are sums over up to 100 steps; measured: 2e-5 between batches of different widths
SCORE_TOLERANCE = 2e-4
CLIPS = sorted((demo_model_path() / "clips").glob("*.flac"))

ARPA = """\\data\\
ngram 1=5
ngram 2=2

\\1-grams:
-99\t<s>\t-0.3
-1.5\t</s>
-9.0\t<unk>
-0.7\tfive\t-0.2
-0.9\tnine\t-0.2

\\2-grams:
-0.1\tfive nine
-2.0\tnine five

\\end\\
"""


@pytest.fixture(scope="module")
def tree() -> Any:
    """Return phrases of the small models."""
    phrases = [BoostedPhrase((5, 6)), BoostedPhrase((17,), 3.0), BoostedPhrase((5, 30, 8))]
    return build_boosting_tree(phrases, VOCAB - 1, context_score=2.0)


@pytest.fixture(scope="module")
def demo() -> Any:
    """Return a pipeline with the demo model."""
    return load_pipeline("demo", dtype="float32")


def labels_of(output: Any, row: int) -> list[int]:
    """Return the labels of one hypothesis."""
    return output.hypotheses.to_lists(row)["tokens"]


@pytest.mark.parametrize("head", HEADS)
def test_hypotheses_of_a_beam_search_are_ordered_and_do_not_depend_on_the_batch(head: str, tree: Any):
    search = {"num_beams": 3, "num_return_sequences": 2, "boosting": tree, "output_confidence": True}
    batch = run(tiny(head), *batch_of([0, 2, 4]), **search)
    assert len(batch.sequences) == len(batch.sequences_scores) == len(batch.hypotheses) == 6
    scores = batch.sequences_scores.reshape(3, 2)
    assert (scores[:, 0] >= scores[:, 1]).all()
    penalty = 0 if head == "ctc" else 1
    expected_scores = batch.hypotheses.scores / (batch.hypotheses.lengths + 1) ** penalty
    assert torch.equal(batch.sequences_scores, expected_scores)
    for index, clip_index in enumerate((0, 2, 4)):
        alone = run(tiny(head), *batch_of([clip_index]), **search)
        for rank in range(2):
            assert labels_of(alone, rank) == labels_of(batch, 2 * index + rank)
        difference = (alone.sequences_scores - scores[index]).abs().max()
        assert difference < SCORE_TOLERANCE


@pytest.mark.parametrize("head", TRANSDUCERS)
def test_the_sequences_of_a_beam_search_contain_its_labels_and_all_frames(head: str):
    features, mask = batch_of([2, 4, 0])
    output = run(tiny(head), features, mask, num_beams=4, num_return_sequences=3)
    frames = tiny(head)._get_subsampling_output_length(mask.sum(-1))
    for row, tokens in enumerate(output.sequences.tolist()):
        assert tokens[0] == BLANK
        assert [token for token in tokens if token not in (BLANK, PAD)] == labels_of(output, row)
        # the last step reaches the last frame, unless the search has fewer hypotheses
        is_missing = output.sequences_scores[row] == -torch.inf
        assert output.durations[row].sum() >= (0 if is_missing else frames[row // 3])
    assert (output.sequences_scores.reshape(3, 3)[:, 0] > -torch.inf).all()


def test_the_sequences_of_a_ctc_beam_search_collapse_to_its_labels():
    output = run(tiny("ctc"), *batch_of([2, 4]), num_beams=4, num_return_sequences=4)
    for row, tokens in enumerate(output.sequences.tolist()):
        runs = [token for index, token in enumerate(tokens) if index == 0 or token != tokens[index - 1]]
        assert [token for token in runs if token != BLANK] == labels_of(output, row)


@pytest.mark.parametrize("head", HEADS)
def test_a_wider_search_finds_the_better_hypothesis(head: str):
    greedy = run(tiny(head), *batch_of([4]))
    narrow = run(tiny(head), *batch_of([4]), num_beams=2, length_penalty=0.0)
    wide = run(tiny(head), *batch_of([4]), num_beams=8, length_penalty=0.0)
    assert wide.sequences_scores[0] >= narrow.sequences_scores[0] - SCORE_TOLERANCE
    assert greedy.sequences_scores is None


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_zero_change_nothing(head: str, tree: Any):
    plain = run(tiny(head), *batch_of([0, 2, 4]))
    weightless = run(tiny(head), *batch_of([0, 2, 4]), boosting=tree, boosting_weight=0.0)
    assert torch.equal(plain.sequences, weightless.sequences)
    boosted = run(tiny(head), *batch_of([0, 2, 4]), boosting=tree, boosting_weight=5.0)
    assert not torch.equal(plain.sequences, boosted.sequences)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_each_clip_can_have_its_own_phrases(head: str, num_beams: int, tree: Any):
    other = build_boosting_tree([BoostedPhrase((9,)), BoostedPhrase((30, 31))], VOCAB - 1, context_score=4.0)
    batch = run(tiny(head), *batch_of([0, 2, 4]), num_beams=num_beams, boosting=[other, None, tree])
    for row, (clip_index, phrases) in enumerate(((0, other), (2, None), (4, tree))):
        alone = run(tiny(head), *batch_of([clip_index]), num_beams=num_beams, boosting=phrases)
        assert labels_of(batch, row) == labels_of(alone, 0)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("head", HEADS)
def test_only_allowed_tokens_are_emitted(head: str, num_beams: int):
    allowed = torch.arange(VOCAB) % 2 == 0
    plain = run(tiny(head), *batch_of([4]))
    assert any(token % 2 for token in labels_of(plain, 0))
    output = run(tiny(head), *batch_of([4]), num_beams=num_beams, allowed_tokens=allowed)
    labels = labels_of(output, 0)
    assert labels
    assert all(token % 2 == 0 for token in labels)


@torch.no_grad()
@pytest.mark.parametrize(("head", "decoder"), [*((head, None) for head in HEADS), ("hybrid_tdt", "ctc")])
def test_generate_equals_the_search_of_the_encoder_frames(head: str, decoder: str | None, tree: Any):
    model, (features, mask) = tiny(head), batch_of([0, 2, 4])
    scorer = draw_table_scorer(VOCAB - 1, 5, torch.Generator().manual_seed(0))
    search = {"num_beams": 3, "num_return_sequences": 2, "language_model": scorer, "lm_weight": 0.4}
    if decoder is not None:
        search["decoder"] = decoder
    output = run(model, features, mask, boosting=tree, boosting_weight=0.7, **search)
    encoded = model.encoder(features, attention_mask=mask)
    hidden, lengths = encoded.last_hidden_state, encoded.attention_mask.sum(-1)
    fusion = build_fusion(scorer, 0.4, tree, 0.7, BLANK, VOCAB)
    assert type(output.sequences).__name__ == ("CTCTokens" if decoder == "ctc" else "Tensor")
    if "ctc" in (head, decoder):
        # `generate` doubles the beam of a CTC search, because a label sequence can be in it with two endings
        expected, _ = beam_decode_ctc(model.ctc_logits(hidden), lengths, BLANK, BeamOptions(6, 2), fusion=fusion)
    else:
        durations = tuple(DURATIONS) if head.endswith("tdt") else None
        options = TransducerOptions(BLANK, VOCAB, durations, SHARED["max_symbols_per_step"])
        networks = model.decoder.step, model.joint.score
        frames = model.encoder_projector(hidden)
        expected = beam_decode_transducer(frames, lengths, *networks, options, BeamOptions(3, 2), fusion=fusion)
    assert len(output.sequences) == len(expected) == 6
    assert expected.lengths.reshape(3, 2)[1:].min() > 0
    assert torch.equal(output.hypotheses.scores, expected.scores)
    for row in range(6):
        lists, expected_lists = output.hypotheses.to_lists(row), expected.to_lists(row)
        assert [lists[name] for name in ("tokens", "frames", "durations")] == [
            expected_lists[name] for name in ("tokens", "frames", "durations")
        ]


@pytest.mark.parametrize("head", HEADS)
def test_a_generation_config_can_choose_the_search(head: str):
    config = GenerationConfig(num_beams=3, num_return_sequences=2)
    output = run(tiny(head), *batch_of([2]), generation_config=config)
    expected = run(tiny(head), *batch_of([2]), num_beams=3, num_return_sequences=2)
    assert torch.equal(output.sequences, expected.sequences)


@pytest.mark.parametrize("head", HEADS)
def test_the_generation_config_of_a_model_chooses_the_search(head: str):
    model = build(head)
    model.generation_config.num_beams, model.generation_config.num_return_sequences = 3, 2
    features, mask = batch_of([2, 0])
    expected = run(model, features, mask, num_beams=3, num_return_sequences=2)
    assert torch.equal(run(model, features, mask).sequences, expected.sequences)
    assert torch.equal(run(model, features, mask, generation_config=GenerationConfig()).sequences, expected.sequences)
    greedy = run(model, features, mask, num_beams=1, num_return_sequences=1)
    assert greedy.sequences_scores is None
    assert len(greedy.sequences) == 2


@pytest.mark.parametrize("head", ["ctc", "rnnt"])
def test_the_blank_of_a_model_with_allowed_tokens_can_be_the_first_token(head: str):
    torch.manual_seed(0)
    if head == "ctc":
        config = ParakeetCTCConfig(vocab_size=VOCAB, pad_token_id=0, encoder_config=ENCODER)
        model: Any = ParakeetForCTC(config).eval()
    else:
        model = ParakeetForRNNT(ParakeetRNNTConfig(**{**SHARED, "blank_token_id": 0})).eval()
    for num_beams in (1, 2):
        labels = labels_of(run(model, *batch_of([0]), num_beams=num_beams, allowed_tokens=torch.arange(VOCAB) < 9), 0)
        assert labels
        assert max(labels) < 9


def test_a_length_penalty_can_be_a_negative_integer():
    output = run(tiny("tdt"), *batch_of([0]), num_beams=2, length_penalty=-1)
    assert torch.equal(output.sequences_scores, output.hypotheses.scores * (output.hypotheses.lengths + 1))


@pytest.mark.parametrize("head", HEADS)
def test_threads_share_a_model_and_phrases(head: str, tree: Any):
    def decode(clip_index: int) -> list[int]:
        """Decode one clip with phrases and a beam search."""
        return labels_of(run(tiny(head), *batch_of([clip_index]), num_beams=3, boosting=tree), 0)

    expected = [decode(index) for index in (0, 2, 4, 6)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(decode, (0, 2, 4, 6))) == expected


def test_the_bonus_for_labels_makes_ctc_texts_longer():
    short = run(tiny("ctc"), *batch_of([2]), num_beams=4, label_bonus=-3.0)
    long = run(tiny("ctc"), *batch_of([2]), num_beams=4, label_bonus=3.0)
    assert long.hypotheses.lengths[0] > short.hypotheses.lengths[0]
    with pytest.raises(ValueError, match="requires a CTC head"):
        run(tiny("tdt"), *batch_of([2]), num_beams=4, label_bonus=3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 2, "num_return_sequences": 3}, "at most `num_beams`"),
        ({"num_beams": 0}, "num_beams"),
        ({"num_beams": 2, "streamer": BaseStreamer()}, "greedy decoding"),
        ({"boosting": build_boosting_tree([BoostedPhrase((1,))], 7)}, "got 7 labels for a model with 39"),
        ({"boosting": [build_boosting_tree([BoostedPhrase((1,))], VOCAB - 1)] * 2}, "got 2 entries for 1 clips"),
        ({"boosting": []}, "got 0 entries for 1 clips"),
        ({"boosting": [None, None]}, "got 2 entries for 1 clips"),
        ({"allowed_tokens": torch.ones(7, dtype=torch.bool)}, r"got the shape \(7,\)"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "`length_penalty` must be a finite number"),
    ],
)
@pytest.mark.parametrize("head", HEADS)
def test_impossible_searches_are_refused(head: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        run(tiny(head), *batch_of([0]), **arguments)


@pytest.mark.parametrize("head", HEADS)
def test_the_path_of_a_language_model_is_refused(head: str):
    with pytest.raises(TypeError, match=r"got str: build it with `processor.load_language_model`"):
        run(tiny(head), *batch_of([0]), language_model="model.arpa")


def test_the_pipeline_boosts_phrases_and_loads_a_language_model(demo: Any, tmp_path):
    arpa = tmp_path / "digits.arpa"
    arpa.write_text(ARPA, encoding="utf-8")
    clip = str(CLIPS[0])
    # so large a score makes the model emit the word
    boosted = demo(clip, boost=[("nine", 40.0)])["text"]
    assert "nine" in boosted
    assert "nine" not in demo(clip)["text"]
    # a model that knows two words changes the text
    text = demo(clip, language_model=arpa, generate_kwargs={"num_beams": 4, "lm_weight": 3.0})["text"]
    processor = demo.processor
    output = demo.model.generate(
        **processor(load_audio(clip), sampling_rate=16000),
        language_model=processor.load_language_model(arpa, units="words"),
        num_beams=4,
        lm_weight=3.0,
    )
    assert text == processor.batch_decode(output.sequences, skip_special_tokens=True)[0]
    assert text != demo(clip, num_beams=4)["text"]


def test_the_pipeline_combines_a_beam_search_with_windows_batches_times_and_confidence(demo: Any):
    samples = [load_audio(clip) for clip in CLIPS[:4]]
    options = {"chunk_length_s": 2.0, "num_beams": 3, "boost": ["nine"], "return_timestamps": "word"}
    batch = demo(samples, batch_size=3, return_confidence=True, **options)
    for clip_samples, result in zip(samples, batch, strict=True):
        alone = demo(clip_samples, return_confidence=True, **options)
        assert alone["text"] == result["text"]
        assert [chunk["timestamp"] for chunk in alone["chunks"]] == [chunk["timestamp"] for chunk in result["chunks"]]
        assert all(0.0 <= chunk["confidence"] <= 1.0 for chunk in result["chunks"])


def test_the_pipeline_refuses_several_hypotheses(demo: Any):
    with pytest.raises(ValueError, match=r"`num_return_sequences` must be 1"):
        demo(str(CLIPS[0]), generate_kwargs={"num_beams": 4, "num_return_sequences": 4})


def test_the_pipeline_returns_one_text_per_clip_whatever_the_generation_config(demo: Any, monkeypatch):
    clips = [str(clip) for clip in CLIPS[:3]]
    expected = [demo(clip, num_beams=3)["text"] for clip in clips]
    settings = {**demo.model.generation_config.to_dict(), "num_beams": 3, "num_return_sequences": 3}
    monkeypatch.setattr(demo.model, "generation_config", GenerationConfig.from_dict(settings))
    assert [result["text"] for result in demo(clips, batch_size=3)] == expected
    results = list(transcribe(clips, demo))
    assert [result.text for result in results] == expected
    assert results[0].settings["num_beams"] == 3
    assert next(transcribe(clips[0], demo, num_beams=1)).settings["num_beams"] == 1


def test_phrases_of_the_constructor_are_defaults(demo: Any):
    clip, model, processor = str(CLIPS[0]), demo.model, demo.processor
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    # without a processor, and with one
    for arguments in (parts, {"processor": processor}):
        pipe = ParakeetASRPipeline(model, **arguments, boost=[("nine", 40.0)], scripts=["Latin"])
        assert "nine" in pipe(clip)["text"]
        for boost in ((), None):
            assert pipe(clip, boost=boost, scripts=None)["text"] == demo(clip)["text"]


def test_the_pipeline_refuses_contradictory_arguments(demo: Any):
    tree = demo.processor.boosting_tree(["nine"])
    with pytest.raises(ValueError, match="one of `boost` and `boosting` must be None"):
        demo(str(CLIPS[0]), boost=["nine"], generate_kwargs={"boosting": tree})
    with pytest.raises(TypeError, match="`boosting` must be one tree, got a list"):
        demo(str(CLIPS[0]), generate_kwargs={"boosting": [tree]})


def test_scripts_restrict_the_letters(demo: Any):
    latin = demo(str(CLIPS[0]), scripts=["Latin"])["text"]
    assert latin == demo(str(CLIPS[0]))["text"]
    with pytest.raises(ValueError, match="Cyrillic"):
        demo(str(CLIPS[0]), scripts=["Cyrillic"])


def test_transcribe_passes_the_search_on_and_records_it(demo: Any):
    (result,) = transcribe(CLIPS[0], demo, num_beams=4, boost=[("nine", 40.0)])
    assert "nine" in result.text
    assert result.settings["num_beams"] == 4


def test_the_command_passes_the_search_on(tmp_path, capsys):
    from transformers_parakeet_cli.app import app

    phrases, arpa = tmp_path / "phrases.txt", tmp_path / "digits.arpa"
    phrases.write_text("# digits\nnine\t40\n", encoding="utf-8")
    arpa.write_text(ARPA, encoding="utf-8")
    arguments = ["transcribe", str(CLIPS[0]), "--model", "demo", "--jsonl", "--dtype", "float32", "--quiet"]
    app([*arguments, "--boost", str(phrases)], standalone_mode=False)
    boosted = json.loads(capsys.readouterr().out)
    assert "nine" in boosted["text"]
    app([*arguments, "--beams", "4", "--lm", str(arpa), "--lm-weight", "3"], standalone_mode=False)
    result = json.loads(capsys.readouterr().out)
    demo = load_pipeline("demo", dtype="float32")
    assert result["text"] == demo(str(CLIPS[0]), num_beams=4, language_model=arpa, lm_weight=3.0)["text"]
    assert result["text"] != boosted["text"]


def test_processor_builds_the_arguments_of_generate(demo: Any):
    processor = ParakeetProcessor.from_pretrained(demo_model_path())
    inputs = processor(load_audio(CLIPS[0]), sampling_rate=16000)
    output = demo.model.generate(**inputs, boosting=processor.boosting_tree([("nine", 40.0)]))
    assert "nine" in processor.batch_decode(output.sequences, skip_special_tokens=True)[0]

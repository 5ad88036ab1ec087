"""Greedy decoding with token scorers and allowed tokens, compared with plain loops over frames, whole and in parts."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise, zip_longest

import pytest
import torch
from search_helpers import PlainFusion, draw_boosting_fusion, draw_table_fusion, draw_table_scorer

from transformers_parakeet.decoding import (
    BoostedPhrase,
    Fusion,
    Shortcuts,
    TransducerOptions,
    build_boosting_tree,
    build_fusion,
    collapse_ctc,
    compute_token_confidence,
    finish_ctc,
    greedy_decode_ctc,
    greedy_decode_transducer,
    greedy_decode_transducer_reference,
    mask_joint,
    mask_logits,
    prepare_allowed_tokens,
    resume_ctc,
    resume_greedy_ctc,
    resume_transducer,
    stack_ctc_states,
    stack_transducer_states,
    start_ctc_state,
    start_transducer_state,
)

VOCAB, BLANK, WIDTH = 7, 6, 5
# float32 scores of the scorers and float64 logits, in batches of different sizes; measured: 1.2e-7
CONFIDENCE_TOLERANCE = 1e-6
CPU = torch.device("cpu")


class RandomNetworks:
    """Prediction and joint network with random float64 weights; the networks of all clips are the same.

    Args:
        seed: seed of the weights.
        durations: durations of the duration outputs; `None` for RNN-T.
        blank_bias: added to the score of the blank.
    """

    def __init__(self, seed, durations, blank_bias=1.5):
        generator = torch.Generator().manual_seed(seed)

        def weights(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        num_outputs = VOCAB + len(durations or ())
        self.embedding, self.recurrent = weights(VOCAB, WIDTH), 0.5 * weights(WIDTH, WIDTH)
        self.output, self.bias = weights(num_outputs, WIDTH), weights(num_outputs)
        self.bias[BLANK] += blank_bias
        self.shortcuts = Shortcuts(self.find_best_durations if durations else None, self.find_best_tokens)

    def predict(self, labels, state):
        hidden = torch.zeros(1, len(labels), WIDTH, dtype=torch.float64) if state is None else state[0]
        hidden = torch.tanh(hidden @ self.recurrent + self.embedding[labels])
        return hidden[0], (hidden,)

    def joint(self, encoder_states, predictor_states):
        return torch.tanh(encoder_states + predictor_states) @ self.output.T + self.bias

    def find_best_durations(self, encoder_states, predictor_states):
        return self.joint(encoder_states, predictor_states)[..., VOCAB:].argmax(-1)

    def find_best_tokens(self, encoder_states, predictor_states):
        return self.joint(encoder_states, predictor_states)[..., :VOCAB].argmax(-1)


def choose_plainly(fusion, labels, logits, forbidden=None):
    """Choose the best label of one frame after all labels before."""
    logits = logits.tolist()
    return max(
        set(range(VOCAB - 1)) - {forbidden}, key=lambda label: logits[label] + fusion.score(tuple(labels), label)
    )


def decode_plainly(networks, frames, options, fusion):
    """Decode one clip with a transducer, one frame at a time; return tokens, frames, durations and confidences."""
    result = {"tokens": [], "frames": [], "durations": [], "confidence": []}
    predictor_state, lstm_state = networks.predict(torch.tensor([BLANK]), None)
    frame = num_labels = 0
    while frame < len(frames):
        logits = networks.joint(frames[frame], predictor_state[0])
        token = int(logits[:VOCAB].argmax())
        duration = options.durations[int(logits[VOCAB:].argmax())] if options.durations else int(token == BLANK)
        if token == BLANK:
            frame, num_labels = frame + max(1, duration), 0
            continue
        label = choose_plainly(fusion, result["tokens"], logits)
        probability = float(logits[:VOCAB].softmax(0)[label])
        for name, value in zip(
            result, (label, frame, duration, max(0.0, (probability * VOCAB - 1) / (VOCAB - 1))), strict=True
        ):
            result[name].append(value)
        predictor_state, lstm_state = networks.predict(torch.tensor([label]), lstm_state)
        num_labels = 0 if duration else num_labels + 1
        if num_labels == options.max_symbols:
            duration, num_labels = 1, 0
        frame += duration
    return result


def decode_ctc_plainly(logits, fusion):
    """Choose the token of every frame of one clip with a CTC head, one frame at a time."""
    labels, tokens = [], []
    for frame_logits in logits:
        token, previous = int(frame_logits.argmax()), tokens[-1] if tokens else BLANK
        if token not in (BLANK, previous):
            token = choose_plainly(fusion, labels, frame_logits, forbidden=previous)
            labels.append(token)
        tokens.append(token)
    return tokens


def draw_fusion(seed):
    """Draw a table of scores, and for odd seeds also phrases to boost; return the fusion and the plain fusion."""
    generator = torch.Generator().manual_seed(seed)
    fusion, plain_fusion = draw_table_fusion(VOCAB - 1, generator, (0.7,), scale=2.0)
    if seed % 2 == 0:
        return fusion, plain_fusion
    boosting, plain_boosting = draw_boosting_fusion(seed, VOCAB - 1)
    return (
        Fusion(fusion.scorers + boosting.scorers, fusion.weights + boosting.weights),
        PlainFusion(plain_fusion.scorers + plain_boosting.scorers, plain_fusion.weights + plain_boosting.weights),
    )


def build_tree(phrases, context_score=1.0):
    """Build the boosting tree of phrases, each a list of tokens."""
    return build_boosting_tree([BoostedPhrase(tuple(phrase)) for phrase in phrases], VOCAB - 1, context_score)


def draw_scorer(seed, num_labels=VOCAB - 1):
    """Draw a token scorer."""
    return draw_table_scorer(num_labels, 8, torch.Generator().manual_seed(seed), scale=2.0)


def random_frames(seed, num_clips, num_frames):
    """Return (B, N, WIDTH) random frames and (B,) lengths; the frames after the end of a clip are NaN."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.randn(num_clips, num_frames, WIDTH, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, num_frames + 1, (num_clips,), generator=generator)
    lengths[0] = num_frames
    frames[torch.arange(num_frames) >= lengths[:, None]] = torch.nan
    return frames, lengths


def check_lists(lists, expected):
    """Check that two hypotheses are equal, and their confidences up to rounding."""
    assert [lists[name] for name in ("tokens", "frames", "durations")] == [
        expected[name] for name in ("tokens", "frames", "durations")
    ]
    if lists["confidence"] is not None:
        assert lists["confidence"] == pytest.approx(expected["confidence"], abs=CONFIDENCE_TOLERANCE)


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (2, 0, 1), (0, 7)], ids=str)
def test_both_transducer_searches_equal_a_loop_over_frames(durations):
    num_labels = num_changed = 0
    for seed in range(50):
        rng = random.Random(f"{seed} {durations}")
        networks, (fusion, plain_fusion) = RandomNetworks(seed, durations), draw_fusion(seed)
        options = TransducerOptions(BLANK, VOCAB, durations, rng.choice([1, 2, 5]), lookahead=rng.choice([0, 1, 3, 20]))
        frames, lengths = random_frames(seed, rng.choice([1, 1, 4]), 10)
        arguments = frames, lengths, networks.predict, networks.joint
        expected = [
            decode_plainly(networks, clip[:length], options, plain_fusion)
            for clip, length in zip(frames, lengths.tolist(), strict=True)
        ]
        plain = greedy_decode_transducer(*arguments, options)
        with_confidence = replace(options, confidence="max_prob")
        results = [
            greedy_decode_transducer_reference(*arguments, with_confidence, fusion=fusion),
            greedy_decode_transducer(*arguments, with_confidence, fusion=fusion),
            greedy_decode_transducer(*arguments, options, fusion=fusion, shortcuts=networks.shortcuts),
        ]
        for row, clip in enumerate(expected):
            for hypotheses in results:
                check_lists(hypotheses.to_lists(row), clip)
            num_labels += len(clip["tokens"])
            num_changed += plain.to_lists(row)["tokens"] != clip["tokens"]
    assert num_labels > 200
    assert num_changed > 40


def test_ctc_equals_a_loop_over_frames():
    num_changed = num_repeats = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        fusion, plain_fusion = draw_fusion(seed)
        # two frames in three repeat the frame before, as in speech
        logits = 2 * torch.randn(5, 20, VOCAB, generator=generator)
        for frame in range(1, 20):
            if frame % 3:
                logits[:, frame] = logits[:, frame - 1] + 0.3 * torch.randn(5, VOCAB, generator=generator)
        lengths = torch.tensor([20, 0, 1, 13, 20])
        logits[torch.arange(20) >= lengths[:, None]] = torch.nan
        tokens = greedy_decode_ctc(logits, lengths, BLANK, fusion)
        plain = greedy_decode_ctc(logits, lengths, BLANK)
        for row, length in enumerate(lengths.tolist()):
            expected = decode_ctc_plainly(logits[row, :length], plain_fusion)
            assert tokens[row].tolist() == expected + [BLANK] * (20 - length)
            num_repeats += sum(first == second != BLANK for first, second in pairwise(expected))
        num_changed += int((tokens != plain).sum())
        assert torch.equal(greedy_decode_ctc(logits[:1], None, BLANK, fusion), tokens[:1])
    assert num_changed > 300
    assert num_repeats > 300


def test_a_scorer_without_scores_and_a_weight_of_zero_change_nothing():
    networks, (frames, lengths) = RandomNetworks(1, (0, 1, 2)), random_frames(1, 6, 15)
    options = TransducerOptions(BLANK, VOCAB, (0, 1, 2), confidence="max_prob")
    arguments = frames, lengths, networks.predict, networks.joint, options
    expected = greedy_decode_transducer(*arguments)
    tree, model = build_tree([[0, 1, 2], [3]]), draw_scorer(0)
    assert build_fusion(model, 0.0, tree, 0.0, BLANK, VOCAB) is None
    assert build_fusion(None, 0.3, None, 1.0, BLANK, VOCAB) is None
    assert build_fusion(None, 0.3, [None, None], 1.0, BLANK, VOCAB) is None
    assert build_fusion(model, 0.0, tree, 2.0, BLANK, VOCAB).scorers == (tree,)
    # clips without boosting in a batch with boosting
    fusion = build_fusion(None, 0.3, [tree, None, None, tree, None, None], 5.0, BLANK, VOCAB)
    hypotheses = greedy_decode_transducer(*arguments, fusion=fusion)
    for row in (1, 2, 4, 5):
        assert hypotheses.to_lists(row) == expected.to_lists(row)
    assert hypotheses.to_lists(0) != expected.to_lists(0)


def test_each_clip_of_a_batch_has_its_own_boosting_tree():
    networks, (frames, _) = RandomNetworks(2, None, blank_bias=0.0), random_frames(2, 4, 15)
    frames = frames[:1].repeat(4, 1, 1)
    options, lengths = TransducerOptions(BLANK, VOCAB), torch.full((4,), 15)
    model = draw_scorer(5)
    trees = [build_tree([[0, 1]], 4.0), None, build_tree([[2, 2, 3]], 4.0)]
    trees.append(trees[0])
    fusion = build_fusion(model, 0.3, trees, 1.0, BLANK, VOCAB)
    together = greedy_decode_transducer(frames, lengths, networks.predict, networks.joint, options, fusion=fusion)
    results = []
    for row, tree in enumerate(trees):
        single = greedy_decode_transducer(
            frames[:1],
            lengths[:1],
            networks.predict,
            networks.joint,
            options,
            fusion=build_fusion(model, 0.3, tree, 1.0, BLANK, VOCAB),
        )
        assert together.to_lists(row) == single.to_lists()
        results.append(single.to_lists()["tokens"])
    assert results[0] == results[3]
    assert len({tuple(tokens) for tokens in results}) == 3


def test_threads_share_a_fusion():
    networks, fusion = RandomNetworks(3, (0, 1, 2)), draw_fusion(3)[0]
    options = TransducerOptions(BLANK, VOCAB, (0, 1, 2))

    def decode(seed):
        frames, lengths = random_frames(seed, 3, 20)
        hypotheses = greedy_decode_transducer(frames, lengths, networks.predict, networks.joint, options, fusion=fusion)
        return [hypotheses.to_lists(row) for row in range(3)]

    expected = [decode(seed) for seed in range(12)]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(decode, range(12))) == expected


@pytest.mark.parametrize("has_fusion", [False, True])
def test_tokens_that_are_not_allowed_are_never_emitted(has_fusion):
    num_changed = 0
    for seed in range(20):
        fusion = draw_fusion(seed)[0] if has_fusion else None
        networks, (frames, lengths) = RandomNetworks(seed, (0, 1, 2), blank_bias=0.0), random_frames(seed, 4, 15)
        options = TransducerOptions(BLANK, VOCAB, (0, 1, 2), 3, confidence="max_prob")
        # the blank is always allowed
        mask = torch.tensor([True, False, True, False, False, True, False])
        joint = mask_joint(networks.joint, mask, BLANK, VOCAB)
        assert mask.tolist() == [True, False, True, False, False, True, False]
        # the same networks without the outputs that are not allowed
        masked = RandomNetworks(seed, (0, 1, 2), blank_bias=0.0)
        masked.bias[torch.tensor([1, 3, 4])] = -torch.inf
        durations = Shortcuts(find_best_durations=networks.find_best_durations)
        expected = greedy_decode_transducer_reference(
            frames, lengths, masked.predict, masked.joint, options, fusion=fusion
        )
        for shortcuts in (None, durations):
            hypotheses = greedy_decode_transducer(
                frames, lengths, networks.predict, joint, options, shortcuts=shortcuts, fusion=fusion
            )
            for row in range(4):
                check_lists(hypotheses.to_lists(row), expected.to_lists(row))
        labels = torch.cat([hypotheses[row].tokens[0] for row in range(4)]).unique().tolist()
        assert set(labels) <= {0, 2, 5}
        plain = greedy_decode_transducer(frames, lengths, networks.predict, networks.joint, options, fusion=fusion)
        num_changed += not torch.equal(plain.tokens, hypotheses.tokens)
        logits = torch.randn(3, 30, VOCAB, generator=torch.Generator().manual_seed(seed))
        tokens = greedy_decode_ctc(mask_logits(logits, mask, BLANK), None, BLANK, fusion)
        assert set(tokens.unique().tolist()) == {0, 2, 5, BLANK}
    assert num_changed >= 15


def test_a_mask_of_allowed_tokens_must_fit_the_model():
    with pytest.raises(ValueError, match=r"\(7,\), got the shape \(6,\)"):
        prepare_allowed_tokens(torch.ones(6, dtype=torch.bool), BLANK, VOCAB)
    with pytest.raises(TypeError, match=r"must be a tensor of type bool, got torch\.int64"):
        prepare_allowed_tokens(torch.arange(VOCAB), BLANK, VOCAB)
    with pytest.raises(TypeError, match="got list"):
        prepare_allowed_tokens([True] * VOCAB, BLANK, VOCAB)
    only_blank = torch.zeros(VOCAB, dtype=torch.bool)
    only_blank[BLANK] = True
    with pytest.raises(ValueError, match="at least one label"):
        prepare_allowed_tokens(only_blank, BLANK, VOCAB)


def test_scorers_must_fit_the_model():
    model = draw_scorer(0, VOCAB)
    with pytest.raises(ValueError, match="got 7 labels for a model with 6"):
        build_fusion(model, 0.3, None, 1.0, BLANK, VOCAB)
    with pytest.raises(ValueError, match="the blank 0 and 8 tokens"):
        build_fusion(model, 0.3, None, 1.0, 0, VOCAB + 1)
    with pytest.raises(ValueError, match="`lm_weight` must be a finite number, got nan"):
        build_fusion(model, float("nan"), None, 1.0, BLANK + 1, VOCAB + 1)
    with pytest.raises(TypeError, match="must be a tree or `None`, got list"):
        build_fusion(None, 0.3, [[0, 1]], 1.0, BLANK, VOCAB)
    fusion = Fusion((model,), (1.0,))
    networks, (frames, lengths) = RandomNetworks(0, None), random_frames(0, 1, 3)
    for decode in (greedy_decode_transducer, greedy_decode_transducer_reference):
        with pytest.raises(ValueError, match="got 7 labels"):
            decode(frames, lengths, networks.predict, networks.joint, TransducerOptions(BLANK, VOCAB), fusion=fusion)
    with pytest.raises(ValueError, match="got 7 labels"):
        greedy_decode_ctc(torch.zeros(1, 3, VOCAB), None, BLANK, fusion)
    trees = [build_tree([[0]])] * 2
    with pytest.raises(ValueError, match="2 automata for 1 clips"):
        greedy_decode_ctc(torch.zeros(1, 3, VOCAB), None, BLANK, build_fusion(None, 0, trees, 1, BLANK, VOCAB))


def test_confidence_is_that_of_the_emitted_token():
    logits = torch.tensor([[2.0, 1.0, 0.0, -8.0]])
    probabilities = logits.double().softmax(-1)[0]
    for token in range(4):
        expected = max(0.0, float(probabilities[token] * 4 - 1) / 3)
        assert float(compute_token_confidence(logits, "max_prob", torch.tensor([token]))) == pytest.approx(
            expected, abs=CONFIDENCE_TOLERANCE
        )
    assert compute_token_confidence(logits, tokens=torch.tensor([0])) == compute_token_confidence(logits)
    entropy = compute_token_confidence(logits, "entropy")
    assert compute_token_confidence(logits, "entropy", torch.tensor([2])) == entropy


def split_lengths(length, rng, largest):
    """Split a number of frames into random parts; parts without frames occur."""
    parts = []
    while sum(parts) < length:
        parts.append(min(rng.randint(0, largest), length - sum(parts)))
    return parts


def join(parts):
    """Join the hypotheses of the parts of one stream to lists."""
    lists = [part.to_lists(0) for part in parts]
    return {name: [value for part in lists for value in part[name]] for name in lists[0]}


@pytest.mark.parametrize("durations", [None, (0, 1, 2, 3, 4), (0, 2, 9)], ids=str)
def test_a_transducer_with_fusion_in_parts_equals_the_whole(durations):
    num_labels = 0
    for seed in range(12):
        rng = random.Random(f"{seed} {durations}")
        networks, fusion = RandomNetworks(seed, durations), draw_fusion(seed)[0]
        options = TransducerOptions(BLANK, VOCAB, durations, 3, confidence="max_prob")
        frames = torch.randn(2, 40, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = greedy_decode_transducer_reference(
            frames, torch.tensor([40, 40]), networks.predict, networks.joint, options, fusion=fusion
        )
        states = [start_transducer_state(networks.predict, 1, BLANK, CPU, fusion) for _ in range(2)]
        parts, positions = [[], []], [0, 0]
        for lengths in zip_longest(*(split_lengths(40, rng, 6) for _ in range(2)), fillvalue=0):
            # padding must have no effect
            batch = torch.full((2, 6, WIDTH), torch.nan, dtype=torch.float64)
            for row, length in enumerate(lengths):
                batch[row, :length] = frames[row, positions[row] : positions[row] + length]
                positions[row] += length
            hypotheses, state = resume_transducer(
                batch,
                torch.tensor(lengths),
                stack_transducer_states(states),
                networks.predict,
                networks.joint,
                options,
                shortcuts=networks.shortcuts,
                fusion=fusion,
            )
            for row in range(2):
                parts[row].append(hypotheses[row])
                states[row] = state.select(row)
        assert positions == [40, 40]
        for row in range(2):
            check_lists(join(parts[row]), expected.to_lists(row))
        num_labels += int(expected.lengths.sum())
    assert num_labels > 80


def test_ctc_with_fusion_in_parts_equals_the_whole():
    num_continued = 0
    for seed in range(30):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        fusion = draw_fusion(seed)[0]
        logits = 2 * torch.randn(1, 30, VOCAB, generator=generator)
        # every second frame repeats the frame before, so that runs cross the end of a part
        logits[:, 1::2] = logits[:, ::2] + 0.3 * torch.randn(1, 15, VOCAB, generator=generator)
        tokens = greedy_decode_ctc(logits, None, BLANK, fusion)
        confidence = compute_token_confidence(logits, "max_prob", tokens)
        expected = collapse_ctc(tokens, BLANK, confidence).to_lists(0)
        other = start_ctc_state(1, BLANK, fusion)
        state, parts, position = start_ctc_state(1, BLANK, fusion), [], 0
        for length in split_lengths(30, rng, 4):
            chunk = torch.full((2, 4, VOCAB), torch.nan)
            chunk[0, :length] = logits[0, position : position + length]
            # the second stream of the batch must have no effect
            chunk[1] = torch.randn(4, VOCAB, generator=generator)
            lengths, both = torch.tensor([length, 4]), stack_ctc_states([state, other])
            num_continued += both.last_runs[0].token != BLANK
            part_tokens, both = resume_greedy_ctc(chunk, lengths, both, BLANK, fusion)
            confidence = compute_token_confidence(chunk, "max_prob", part_tokens)
            hypotheses, both = resume_ctc(part_tokens, lengths, both, BLANK, confidence)
            state, other, position = both.select(0), both.select(1), position + length
            parts.append(hypotheses[0])
        parts.append(finish_ctc(state, BLANK, CPU, has_confidence=True))
        check_lists(join(parts), expected)
    assert num_continued > 100


def test_frames_that_count_as_blanks_do_not_change_the_fusion_state():
    fusion, networks = draw_fusion(1)[0], RandomNetworks(0, None)
    state = start_transducer_state(networks.predict, 2, BLANK, CPU, fusion)
    assert state.fusion_states.shape == (2, 2)
    assert state.skip_blank_frames(3).fusion_states is state.fusion_states


def test_a_stream_keeps_its_fusion():
    fusion, networks = draw_fusion(1)[0], RandomNetworks(0, None)
    options = TransducerOptions(BLANK, VOCAB)
    with_fusion = start_transducer_state(networks.predict, 1, BLANK, CPU, fusion)
    without = start_transducer_state(networks.predict, 1, BLANK, CPU)
    frames, lengths = random_frames(0, 1, 3)
    arguments = networks.predict, networks.joint, options
    with pytest.raises(ValueError, match="got none for a state that was started with them"):
        resume_transducer(frames, lengths, with_fusion, *arguments)
    with pytest.raises(ValueError, match="got some for a state that was started without them"):
        resume_transducer(frames, lengths, without, *arguments, fusion=fusion)
    with pytest.raises(ValueError, match="got 1 of 2 states with them"):
        stack_transducer_states([with_fusion, without])
    with pytest.raises(ValueError, match="got none for a state that was started with them"):
        resume_greedy_ctc(torch.zeros(1, 1, VOCAB), torch.tensor([1]), start_ctc_state(1, BLANK, fusion), BLANK)

"""Small automata for the tests of fusion: from an ARPA file, from phrases, and random ones."""

import math

import torch

from transformers_parakeet.decoding import BackoffAutomaton

# NeMo writes the token i as the character with this code plus i
TOKEN_OFFSET = 100


def build_automaton(states, arcs, backoffs, roots, num_labels, start):
    """Build an automaton from dictionaries.

    Args:
        states: all states, the root first; any hashable objects.
        arcs: (state, token) -> (score, next state), without those of the root.
        backoffs: state -> (score, next state), without that of the root.
        roots: token -> (score, next state) for every token.
        num_labels: number of labels.
        start: the start state.
    """
    index = {state: number for number, state in enumerate(states)}
    rows = sorted(
        (index[state] * num_labels + token, score, index[target]) for (state, token), (score, target) in arcs.items()
    )
    keys = torch.tensor([key for key, _, _ in rows], dtype=torch.int64)
    backoff_scores = [backoffs[state][0] if state in backoffs else 0.0 for state in states]
    backoff_states = [index[backoffs[state][1]] if state in backoffs else 0 for state in states]
    return BackoffAutomaton(
        start_states=torch.tensor([index[start]]),
        roots=torch.tensor([0]),
        root_scores=torch.tensor([[roots[token][0] for token in range(num_labels)]]),
        root_targets=torch.tensor([[index[roots[token][1]] for token in range(num_labels)]]),
        backoff_states=torch.tensor(backoff_states),
        backoff_scores=torch.tensor(backoff_scores),
        end_scores=torch.zeros(len(states)),
        arc_offsets=torch.searchsorted(keys, torch.arange(len(states) + 1) * num_labels),
        arc_keys=keys,
        arc_scores=torch.tensor([score for _, score, _ in rows]),
        arc_targets=torch.tensor([target for _, _, target in rows], dtype=torch.int64),
        max_backoffs=max(count_backoffs(state, backoff_states) for state in range(len(states))),
    )


def count_backoffs(state, backoff_states):
    """Count the back-offs from a state to the root, which is state 0."""
    return 0 if state == 0 else 1 + count_backoffs(backoff_states[state], backoff_states)


def build_ngram_model(path, num_labels):
    """Build the automaton of an ARPA file whose tokens are characters, as NeMo writes it."""
    ngrams, order = {}, 0
    for line in path.read_text("utf-8").split("\n"):
        if line.startswith("\\") and line.endswith("-grams:"):
            order = int(line[1:].split("-")[0])
        elif order and "\t" in line:
            fields = line.split("\t")
            tokens = tuple(word if len(word) > 1 else ord(word) - TOKEN_OFFSET for word in fields[1].split(" "))
            backoff = float(fields[2]) if len(fields) > 2 else 0.0
            ngrams[tokens] = float(fields[0]) * math.log(10), backoff * math.log(10)
    states = [(), *(tokens for tokens in ngrams if len(tokens) < order and tokens[-1] not in ("</s>", "<unk>"))]
    num_absent = sum((token,) not in ngrams for token in range(num_labels))
    unknown = ngrams[("<unk>",)][0] - math.log(max(1, num_absent)), ()
    roots = {token: (ngrams[(token,)][0], (token,)) if (token,) in ngrams else unknown for token in range(num_labels)}
    arcs = {
        (tokens[:-1], tokens[-1]): (score, tokens if len(tokens) < order else tokens[1:])
        for tokens, (score, _) in ngrams.items()
        if len(tokens) > 1 and isinstance(tokens[-1], int)
    }
    backoffs = {state: (ngrams[state][1], state[1:]) for state in states if state}
    return build_automaton(states, arcs, backoffs, roots, num_labels, ("<s>",))


def build_tree(phrases, num_labels, context_score=1.0, depth_scaling=2.0, unk_score=0.0):
    """Build the boosting tree of phrases, each a list of tokens, with NeMo's scores."""
    phrases = [tuple(phrase) for phrase in phrases]
    states = sorted({phrase[:length] for phrase in phrases for length in range(len(phrase) + 1)}, key=len)
    arc_scores = [0.0] + [
        context_score if depth == 1 else context_score * depth_scaling + math.log(depth)
        for depth in range(1, len(states) + 1)
    ]
    arcs = {(state[:-1], state[-1]): (arc_scores[len(state)], state) for state in states if len(state) > 1}
    roots = {token: (context_score, (token,)) if (token,) in states else (unk_score, ()) for token in range(num_labels)}
    backoffs = {}
    for state in states[1:]:
        fail = next(state[first:] for first in range(1, len(state) + 1) if state[first:] in states)
        lost = 0.0 if state in phrases else sum(arc_scores[: len(fail) + 1]) - sum(arc_scores[: len(state) + 1])
        backoffs[state] = (lost, fail)
    return build_automaton(states, arcs, backoffs, roots, num_labels, ())


def build_random_automaton(seed, num_labels, num_states=8, num_arcs=12, scale=2.0):
    """Build an automaton with random arcs, scores and back-off states."""
    generator = torch.Generator().manual_seed(seed)

    def scores(count):
        return (scale * torch.randn(count, generator=generator)).tolist()

    def integers(end, count):
        return torch.randint(0, end, (count,), generator=generator).tolist()

    states = list(range(num_states))
    backoffs = {
        state: (score, integers(state, 1)[0]) for state, score in zip(states[1:], scores(num_states - 1), strict=True)
    }
    arcs = {
        (1 + state, token): (score, target)
        for state, token, score, target in zip(
            integers(num_states - 1, num_arcs),
            integers(num_labels, num_arcs),
            scores(num_arcs),
            integers(num_states, num_arcs),
            strict=True,
        )
    }
    roots = dict(enumerate(zip(scores(num_labels), integers(num_states, num_labels), strict=True)))
    return build_automaton(states, arcs, backoffs, roots, num_labels, integers(num_states, 1)[0])

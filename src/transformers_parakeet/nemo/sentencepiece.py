"""SentencePiece models: to tokenizers of this package, and back.

Where the models lie in a `.nemo` file is for `nemo.py`; a vocabulary that changes is for `vocabulary.py`.
"""

import base64
import json
import re
from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from ..tokenization_parakeet import BLANK, WORD_START, ParakeetTokenizer
from .archive import NemoError

# marks the pieces of a second language that the first one has, too; a private-use character
DUPLICATE = "\ue000"

# the tokenizer's keyword, and so the field of tokenizer_config.json, that keeps the models it was made from, in base64
MODELS = "sentencepiece_models"

# pattern of the spaces that SentencePiece makes one, and of the start of a text that is not empty
SPACES, START = " {2,}", r"\A(?=[\s\S])"


def build_tokenizer(models: Sequence[bytes], kind: str) -> ParakeetTokenizer:
    """Convert a SentencePiece model, or those of an aggregate, and append the blank.

    An aggregate encodes with its first language; it decodes all of them.

    Args:
        models: serialised models, one per language.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.

    Returns:
        A tokenizer whose last id is the blank; it keeps the models for `sentencepiece_models`.

    Raises:
        NemoError: a model is damaged, or its pieces are not distinct.
    """
    protos = [parse_sentencepiece(content) for content in models]
    more = [piece.piece for proto in protos[1:] for piece in proto.pieces]
    try:
        backend = sentencepiece_backend(protos[0], more)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise NemoError(f"the SentencePiece model cannot be used: {error}") from error
    blank = "<pad>" if kind == "ctc" and backend.token_to_id("<pad>") is None else BLANK
    pad = "<pad>" if kind != "ctc" and backend.token_to_id("<pad>") is not None else blank
    backend.add_special_tokens([AddedToken(blank, special=True, normalized=False)])
    count = len(protos[0].pieces) + len(more)
    if backend.token_to_id(blank) != count:
        raise NemoError(f"the {count} pieces of the SentencePiece model must be distinct, and none of them {blank!r}")
    return ParakeetTokenizer(
        tokenizer_object=backend,
        unk_token=protos[0].trainer_spec.unk_piece,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        **{MODELS: [base64.b64encode(content).decode() for content in models]},
    )


def parse_sentencepiece(content: bytes) -> Any:
    """Return the protocol buffer of a SentencePiece model."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise NemoError(f"the tokenizer is not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise NemoError("the tokenizer is not a SentencePiece model: it has no pieces")
    return proto


def sentencepiece_backend(proto: Any, more: list[str]) -> Tokenizer:
    """Build a tokenizer that splits as SentencePiece does.

    Args:
        proto: the model.
        more: pieces of further languages, appended for decoding.
    """
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    seen = {piece for piece, _ in pieces}
    for piece in more:
        while piece in seen:
            piece += DUPLICATE
        seen.add(piece)
        pieces.append((piece, float("-inf")))
    spec = proto.trainer_spec
    # single characters are never split
    user_defined = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.USER_DEFINED) and len(p.piece) > 1]
    texts = [piece for piece in user_defined if not re.fullmatch("<.*>", piece)]
    if spec.model_type == spec.BPE:
        vocabulary = {piece: index for index, (piece, _) in enumerate(pieces)}
        model: BPE | Unigram = BPE(
            vocabulary,
            merges(proto),
            unk_token=spec.unk_piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            # no merge leads to a piece that its user defines
            ignore_merges=bool(texts),
        )
    else:
        model = Unigram(pieces, spec.unk_id, spec.byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = sentencepiece_normalizer(proto.normalizer_spec)
    byte_steps = [decoders.ByteFallback(), decoders.Fuse()] if spec.byte_fallback else []
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(DUPLICATE, ""),
            *byte_steps,
            decoders.Metaspace(replacement=WORD_START, prepend_scheme="always"),
        ]
    )
    # an added token cuts the text before it is normalised: right for markup, but words would lose the spaces at them
    markup = [AddedToken(piece, normalized=False, special=False) for piece in user_defined if piece not in texts]
    tokenizer.add_tokens(markup)
    if texts:
        longest_first = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    return tokenizer


def merges(proto: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in their order."""
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    return [(left, right) for left, right in generate_merges(ids, [(p.piece, p.score) for p in proto.pieces])]


def sentencepiece_normalizer(spec: Any) -> Any:
    """Build what SentencePiece does before it splits: its table, its spaces, the word start before the first word."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(SPACES), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(START), WORD_START))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])


def plain_pieces(names: Sequence[str]) -> list[str]:
    """Return tokens as their SentencePiece models spell them, without the mark of a second language."""
    return [name.rstrip(DUPLICATE) for name in names]


def sentencepiece_models(tokenizer: Any, labels: int) -> list[bytes]:
    """Return the SentencePiece models of a tokenizer: those it was made from, else one that splits as it does.

    Args:
        tokenizer: a `ParakeetTokenizer`.
        labels: number of its tokens before the blank.

    Raises:
        NemoError: no SentencePiece model splits as the tokenizer does.
    """
    kept = [base64.b64decode(text) for text in tokenizer.init_kwargs.get(MODELS) or []]
    pieces = [piece.piece for content in kept for piece in parse_sentencepiece(content).pieces]
    names = tokenizer.convert_ids_to_tokens(range(labels))
    if pieces and pieces == plain_pieces(names):
        return kept
    return [rebuilt_model(json.loads(tokenizer.backend_tokenizer.to_str()), names)]


def rebuilt_model(backend: dict[str, Any], names: list[str]) -> bytes:
    """Write a SentencePiece model for a tokenizer that came without one.

    Args:
        backend: contents of its tokenizer.json.
        names: tokens before the blank in the order of their ids.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    model, spec = backend["model"], proto.trainer_spec
    if (backend["pre_tokenizer"] or {}).get("type", "Metaspace") != "Metaspace":
        raise NemoError(f"SentencePiece has no splitter {backend['pre_tokenizer']['type']}: train a model with it")
    if model["type"] not in ("BPE", "Unigram"):
        raise NemoError(
            f"a tokenizer for NeMo must be BPE or Unigram, got {model['type']}: train one with SentencePiece"
        )
    is_bpe = model["type"] == "BPE"
    spec.model_type = spec.BPE if is_bpe else spec.UNIGRAM
    spec.byte_fallback = bool(model.get("byte_fallback"))
    unknown = model["unk_token"] if is_bpe else names[model["unk_id"]]
    spec.unk_piece, spec.unk_id, spec.vocab_size = unknown, names.index(unknown), len(names)
    spec.bos_id = spec.eos_id = spec.pad_id = -1
    given = [tuple(pair) for pair in model["merges"]] if is_bpe else []
    scores = {left + right: -float(rank) for rank, (left, right) in reversed(list(enumerate(given)))}
    scores |= {} if is_bpe else dict(model["vocab"])
    added = {token["content"] for token in backend["added_tokens"]}
    for name in names:
        piece = proto.pieces.add(piece=name, score=scores.get(name, -float(len(given))))
        if name == unknown:
            piece.type, piece.score = piece.UNKNOWN, 0.0
        elif name in added:
            piece.type, piece.score = piece.USER_DEFINED, 0.0
        elif spec.byte_fallback and name.startswith("<0x"):
            piece.type = piece.BYTE
    read_normalizer(backend, proto.normalizer_spec)
    if is_bpe and merges(proto) != given:
        raise NemoError(
            "the tokenizer's merges are not those of a SentencePiece model: train one and replace it by that"
        )
    return bytes(proto.SerializeToString())


def read_normalizer(backend: dict[str, Any], spec: Any) -> None:
    """Tell SentencePiece what a tokenizer does before it splits; the reverse of `sentencepiece_normalizer`."""
    step = backend["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = step["normalizers"] if step["type"] == "Sequence" else [step]
    known = {"Precompiled", "Replace", "Strip", "Prepend"}
    if strange := {step["type"] for step in steps} - known:
        raise NemoError(
            f"SentencePiece has no normalizer {', '.join(sorted(strange))}: train a model with it and replace"
        )
    spec.precompiled_charsmap = b"".join(
        base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled"
    )
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Replace"]
    spec.remove_extra_whitespaces = SPACES in patterns
    prepends = any(step["type"] == "Prepend" for step in steps)
    scheme = (backend["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    spec.add_dummy_prefix = START in patterns or prepends or scheme != "never"


def vocabulary_files(model: bytes) -> tuple[bytes, bytes]:
    """Return the `vocab.txt` and the `tokenizer.vocab` that NeMo keeps beside a SentencePiece model."""
    pieces = parse_sentencepiece(model).pieces
    normal = [piece.piece for piece in pieces if piece.type not in (piece.UNKNOWN, piece.CONTROL)]
    words = [name[1:] if name.startswith(WORD_START) and len(name) > 1 else f"##{name}" for name in normal]
    scores = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in pieces)
    return "\n".join(words).encode(), scores.encode()

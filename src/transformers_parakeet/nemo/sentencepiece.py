"""Converts SentencePiece models to tokenizers of this package, and tokenizers to SentencePiece models.

`reader.py` finds the models in a `.nemo` file, and `training/vocabulary.py` adds pieces to them.
"""

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from ..tokenization_parakeet import BLANK, WORD_START, ParakeetTokenizer
from .archive import NemoError

# appended to a piece of a further language that an earlier language also has; a private-use character
DUPLICATE = "\ue000"

# keyword of the tokenizer, and so key of tokenizer_config.json, that stores the original models in base64
MODELS = "sentencepiece_models"

# several spaces, which SentencePiece replaces by one, and the start of a text that is not empty
SPACES, TEXT_START = " {2,}", r"\A(?=[\s\S])"

# pieces such as `<en>` and `<|endoftext|>`
MARKUP = "<.*>"


def build_tokenizer(models: Sequence[bytes], kind: str) -> ParakeetTokenizer:
    """Convert SentencePiece models to a tokenizer, and add the blank as its last token.

    The tokenizer of several languages (NeMo's aggregate tokenizer) encodes with the first and decodes with all of them.

    Args:
        models: serialised SentencePiece models, one per language.
        kind: `"ctc"`, `"rnnt"` or `"tdt"`.

    Returns:
        A tokenizer that also stores the models for `sentencepiece_models`.

    Raises:
        NemoError: a model is damaged, or its pieces are not distinct.
    """
    protos = [parse_sentencepiece(content) for content in models]
    further_pieces = [piece.piece for proto in protos[1:] for piece in proto.pieces]
    try:
        backend = build_backend(protos[0], further_pieces)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise NemoError(f"the SentencePiece model cannot be used: {error}") from error
    has_pad_piece = backend.token_to_id("<pad>") is not None
    blank = "<pad>" if kind == "ctc" and not has_pad_piece else BLANK
    pad = "<pad>" if kind != "ctc" and has_pad_piece else blank
    backend.add_special_tokens([AddedToken(blank, special=True, normalized=False)])
    num_pieces = len(protos[0].pieces) + len(further_pieces)
    if backend.token_to_id(blank) != num_pieces:
        raise NemoError(
            f"the {num_pieces} pieces of the SentencePiece model must be distinct and not include {blank!r}"
        )
    return ParakeetTokenizer(
        tokenizer_object=backend,
        unk_token=protos[0].trainer_spec.unk_piece,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        **{MODELS: [base64.b64encode(content).decode() for content in models]},
    )


def parse_sentencepiece(content: bytes) -> Any:
    """Parse a serialised SentencePiece model.

    Args:
        content: the model, the bytes of `tokenizer.model`.

    Returns:
        Its protocol buffer, a `ModelProto`.

    Raises:
        NemoError: the content is not a SentencePiece model, or has no pieces.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's DecodeError differs between its implementations
        raise NemoError(f"the tokenizer is not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise NemoError("the tokenizer is not a SentencePiece model: it has no pieces")
    return proto


def build_backend(proto: Any, further_pieces: Sequence[str]) -> Tokenizer:
    """Build a tokenizer of the tokenizers library that splits text as a SentencePiece model does.

    Args:
        proto: `ModelProto` of the model.
        further_pieces: pieces of other languages, which are used in decoding only.
    """
    spec = proto.trainer_spec
    # pieces that are matched before the model runs; a single character is never split anyway
    fixed_pieces = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.USER_DEFINED) and len(p.piece) > 1]
    fixed_words = [piece for piece in fixed_pieces if not re.fullmatch(MARKUP, piece)]
    scored_pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    distinct_pieces = mark_duplicates([piece for piece, _ in scored_pieces], further_pieces)
    # a score of minus infinity prevents their use in encoding
    scored_pieces += [(piece, float("-inf")) for piece in distinct_pieces]
    if spec.model_type == spec.BPE:
        model: BPE | Unigram = BPE(
            {piece: index for index, (piece, _) in enumerate(scored_pieces)},
            list_merges(proto),
            unk_token=spec.unk_piece,
            fuse_unk=True,
            byte_fallback=spec.byte_fallback,
            # no sequence of merges produces a user-defined piece
            ignore_merges=bool(fixed_words),
        )
    else:
        model = Unigram(scored_pieces, spec.unk_id, spec.byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = build_normalizer(proto.normalizer_spec)
    tokenizer.decoder = build_decoder(spec.byte_fallback)
    # the text is cut at an added token before it is normalised, which would remove the spaces around a word
    markup = [piece for piece in fixed_pieces if piece not in fixed_words]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in markup])
    if fixed_words:
        longest_first = "|".join(map(re.escape, sorted(fixed_words, key=len, reverse=True)))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(longest_first), "isolated")
    return tokenizer


def mark_duplicates(first_pieces: Sequence[str], further_pieces: Sequence[str]) -> list[str]:
    """Return the pieces of further languages, with `DUPLICATE` appended until each differs from all before it.

    Args:
        first_pieces: the pieces of the first language.
        further_pieces: the pieces of the other languages, in order.
    """
    seen = set(first_pieces)
    distinct_pieces = []
    for piece in further_pieces:
        while piece in seen:
            piece += DUPLICATE
        seen.add(piece)
        distinct_pieces.append(piece)
    return distinct_pieces


def build_decoder(byte_fallback: bool) -> Any:
    """Build the decoder of a tokenizer: it removes the mark of duplicates, joins bytes, and restores spaces."""
    byte_steps = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    spaces = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    return decoders.Sequence([decoders.Replace(DUPLICATE, ""), *byte_steps, spaces])


def list_merges(proto: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model in the order in which they are applied."""
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    return [(left, right) for left, right in generate_merges(ids, scores)]


def build_normalizer(spec: Any) -> Any:
    """Build the normaliser of a tokenizer from the `NormalizerSpec` of a SentencePiece model.

    It applies the character map, removes superfluous spaces, and puts the word start before the first word and in place
    of every space.
    """
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(SPACES), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(TEXT_START), WORD_START))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])


def remove_duplicate_marks(pieces: Sequence[str]) -> list[str]:
    """Return pieces as their SentencePiece models spell them, without the mark of duplicates."""
    return [piece.rstrip(DUPLICATE) for piece in pieces]


def sentencepiece_models(tokenizer: Any, num_labels: int) -> list[bytes]:
    """Return the SentencePiece models of a tokenizer.

    They are the models that it was built from. If there are none, or its pieces have changed since, the result is one
    new model that splits text as the tokenizer does.

    Args:
        tokenizer: a `ParakeetTokenizer`.
        num_labels: number of its tokens before the blank.

    Returns:
        Serialised models, one per language.

    Raises:
        NemoError: no SentencePiece model splits text as the tokenizer does.
    """
    models = [base64.b64decode(text) for text in tokenizer.init_kwargs.get(MODELS) or []]
    model_pieces = [piece.piece for content in models for piece in parse_sentencepiece(content).pieces]
    pieces = tokenizer.convert_ids_to_tokens(range(num_labels))
    if model_pieces and model_pieces == remove_duplicate_marks(pieces):
        return models
    return [build_sentencepiece(json.loads(tokenizer.backend_tokenizer.to_str()), pieces)]


def build_sentencepiece(backend: dict[str, Any], pieces: list[str]) -> bytes:
    """Build a SentencePiece model that splits text as a tokenizer does.

    Args:
        backend: content of the tokenizer's tokenizer.json.
        pieces: its tokens before the blank, in the order of their ids.

    Returns:
        The serialised model.

    Raises:
        NemoError: SentencePiece cannot split text like this tokenizer.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    model, spec = backend["model"], proto.trainer_spec
    splitter = (backend["pre_tokenizer"] or {}).get("type", "Metaspace")
    if splitter != "Metaspace":
        raise NemoError(f"SentencePiece has no splitter {splitter}: train a SentencePiece model")
    if model["type"] not in ("BPE", "Unigram"):
        raise NemoError(
            f"a tokenizer for NeMo must be BPE or Unigram, got {model['type']}: train a SentencePiece model"
        )
    is_bpe = model["type"] == "BPE"
    unknown_piece = model["unk_token"] if is_bpe else pieces[model["unk_id"]]
    spec.model_type = spec.BPE if is_bpe else spec.UNIGRAM
    spec.byte_fallback = bool(model.get("byte_fallback"))
    spec.unk_piece, spec.unk_id, spec.vocab_size = unknown_piece, pieces.index(unknown_piece), len(pieces)
    spec.bos_id = spec.eos_id = spec.pad_id = -1
    merges = [tuple(pair) for pair in model["merges"]] if is_bpe else []
    # pieces without a score come after all merges
    default_score = -float(len(merges))
    scores = dict.fromkeys(pieces, default_score) | (rank_merges(merges) if is_bpe else dict(model["vocab"]))
    add_pieces(proto, pieces, scores, {token["content"] for token in backend["added_tokens"]})
    fill_normalizer_spec(backend, proto.normalizer_spec)
    if is_bpe and list_merges(proto) != merges:
        raise NemoError("the tokenizer's merges are not those of a SentencePiece model: train a SentencePiece model")
    return bytes(proto.SerializeToString())


def add_pieces(proto: Any, pieces: Sequence[str], scores: Mapping[str, float], user_defined: set[str]) -> None:
    """Add pieces with their scores and types to a SentencePiece model.

    Args:
        proto: `ModelProto`, changed in place; its trainer specification names the unknown piece.
        pieces: the pieces in the order of their ids.
        scores: score of each piece; those of the unknown piece and of user-defined ones are not used.
        user_defined: pieces that are matched before the model runs.
    """
    for text in pieces:
        piece = proto.pieces.add(piece=text, score=scores[text])
        if text == proto.trainer_spec.unk_piece:
            piece.type, piece.score = piece.UNKNOWN, 0.0
        elif text in user_defined:
            piece.type, piece.score = piece.USER_DEFINED, 0.0
        elif proto.trainer_spec.byte_fallback and text.startswith("<0x"):
            piece.type = piece.BYTE


def rank_merges(merges: Sequence[tuple[str, ...]]) -> dict[str, float]:
    """Return the score of each piece that merges produce: minus the rank of its first merge, as in SentencePiece."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
    return scores


def fill_normalizer_spec(backend: dict[str, Any], spec: Any) -> None:
    """Set the `NormalizerSpec` of a SentencePiece model to a tokenizer's normaliser; the reverse of `build_normalizer`.

    Args:
        backend: content of the tokenizer's tokenizer.json.
        spec: changed in place.

    Raises:
        NemoError: SentencePiece has no such normaliser.
    """
    normalizer = backend["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    unsupported = {step["type"] for step in steps} - {"Precompiled", "Replace", "Strip", "Prepend"}
    if unsupported:
        names = ", ".join(sorted(unsupported))
        raise NemoError(f"SentencePiece has no normalizer {names}: train a SentencePiece model")
    spec.precompiled_charsmap = b"".join(
        base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled"
    )
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Replace"]
    spec.remove_extra_whitespaces = SPACES in patterns
    has_prepend_step = any(step["type"] == "Prepend" for step in steps)
    prepend_scheme = (backend["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    spec.add_dummy_prefix = TEXT_START in patterns or has_prepend_step or prepend_scheme != "never"


def vocabulary_files(model: bytes) -> tuple[bytes, bytes]:
    """Return the two text files that NeMo stores with a SentencePiece model.

    Args:
        model: the serialised model.

    Returns:
        `vocab.txt`, with one WordPiece-like piece per line, and `tokenizer.vocab`, with pieces and their scores.
    """
    pieces = parse_sentencepiece(model).pieces
    texts = [piece.piece for piece in pieces if piece.type not in (piece.UNKNOWN, piece.CONTROL)]
    words = [text[1:] if text.startswith(WORD_START) and len(text) > 1 else f"##{text}" for text in texts]
    scores = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in pieces)
    return "\n".join(words).encode(), scores.encode()

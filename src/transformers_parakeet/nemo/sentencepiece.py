"""Converts SentencePiece models to tokenizers of this package, and tokenizers to SentencePiece models.

`reader.py` finds the SentencePiece models in a `.nemo` file, and `training/vocabulary.py` extends them.
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

# private-use character that is appended to a piece if the model of a previous language contains the same piece
DUPLICATE_SUFFIX = "\ue000"

# key of `tokenizer.init_kwargs` and of tokenizer_config.json for the original SentencePiece models in base64
SENTENCEPIECE_MODELS_KEY = "sentencepiece_models"

# regular expressions: two or more spaces, which SentencePiece replaces by one; and the start of a non-empty text
SPACES_PATTERN, TEXT_START_PATTERN = " {2,}", r"\A(?=[\s\S])"

# regular expression of special pieces such as `<en>` and `<|endoftext|>`
MARKUP_PATTERN = "<.*>"


def build_tokenizer(serialized_models: Sequence[bytes], head_type: str) -> ParakeetTokenizer:
    """Convert SentencePiece models to a tokenizer whose last token is the blank.

    A tokenizer for several languages (NeMo's aggregate tokenizer) encodes text with the model of the first language and
    decodes the tokens of all languages.

    Args:
        serialized_models: SentencePiece models, one per language, as the bytes of `tokenizer.model`.
        head_type: `"ctc"`, `"rnnt"` or `"tdt"`; it determines the name of the blank token.

    Returns:
        The tokenizer. It also stores the SentencePiece models, which `get_sentencepiece_models` returns.

    Raises:
        NemoError: a model is damaged, or two pieces of a model are equal.
    """
    protos = [parse_sentencepiece(serialized_model) for serialized_model in serialized_models]
    extra_pieces = [piece.piece for proto in protos[1:] for piece in proto.pieces]
    try:
        backend = build_backend(protos[0], extra_pieces)
    except Exception as error:  # the tokenizers library raises plain `Exception`
        raise NemoError(f"the SentencePiece model cannot be used: {error}") from error
    # as in stock transformers, the blank of a CTC tokenizer is named `<pad>` and serves as padding
    has_pad_piece = backend.token_to_id("<pad>") is not None
    blank = "<pad>" if head_type == "ctc" and not has_pad_piece else BLANK
    pad = "<pad>" if head_type != "ctc" and has_pad_piece else blank
    backend.add_special_tokens([AddedToken(blank, special=True, normalized=False)])
    num_pieces = len(protos[0].pieces) + len(extra_pieces)
    if backend.token_to_id(blank) != num_pieces:
        raise NemoError(
            f"the {num_pieces} pieces of the SentencePiece model must be distinct and not include {blank!r}"
        )
    return ParakeetTokenizer(
        tokenizer_object=backend,
        unk_token=protos[0].trainer_spec.unk_piece,
        pad_token=pad,
        clean_up_tokenization_spaces=False,
        **{SENTENCEPIECE_MODELS_KEY: [base64.b64encode(model).decode() for model in serialized_models]},
    )


def parse_sentencepiece(serialized_model: bytes) -> Any:
    """Parse a serialised SentencePiece model.

    Args:
        serialized_model: bytes of `tokenizer.model`.

    Returns:
        The model as a protocol buffer, `ModelProto`.

    Raises:
        NemoError: the bytes are not a SentencePiece model, or the model has no pieces.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    try:
        proto.ParseFromString(serialized_model)
    except Exception as error:  # protobuf has several implementations, each with its own class `DecodeError`
        raise NemoError(f"the tokenizer is not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise NemoError("the tokenizer is not a SentencePiece model: it has no pieces")
    return proto


def build_backend(proto: Any, extra_pieces: Sequence[str]) -> Tokenizer:
    """Build a tokenizer of the tokenizers library that tokenizes text identically to a SentencePiece model.

    Args:
        proto: SentencePiece model, a `ModelProto`.
        extra_pieces: pieces of the other languages of an aggregate tokenizer, appended after the pieces of `proto`.
            They are used in decoding, but not in encoding.
    """
    spec = proto.trainer_spec
    # control and user-defined pieces are matched before the model runs; a single character needs no rule
    fixed_pieces = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.USER_DEFINED) and len(p.piece) > 1]
    fixed_words = [piece for piece in fixed_pieces if not re.fullmatch(MARKUP_PATTERN, piece)]
    markup_pieces = [piece for piece in fixed_pieces if re.fullmatch(MARKUP_PATTERN, piece)]
    tokenizer = Tokenizer(build_model(proto, extra_pieces, ignore_merges=bool(fixed_words)))
    tokenizer.normalizer = build_normalizer(proto.normalizer_spec)
    tokenizer.decoder = build_decoder(spec.byte_fallback)
    # Text is split at added tokens before normalisation, which then strips the spaces at both ends of each part. This
    # is correct for markup. Words must keep their spaces, so the pre-tokenizer splits them off after normalisation.
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in markup_pieces])
    if fixed_words:
        longest_first = sorted(fixed_words, key=len, reverse=True)
        words_pattern = "|".join(map(re.escape, longest_first))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(words_pattern), "isolated")
    return tokenizer


def build_model(proto: Any, extra_pieces: Sequence[str], *, ignore_merges: bool) -> BPE | Unigram:
    """Build the BPE or unigram model of a tokenizer from a SentencePiece model.

    Args:
        proto: SentencePiece model, a `ModelProto`.
        extra_pieces: pieces of the other languages of an aggregate tokenizer, appended after the pieces of `proto`.
            They are used in decoding, but not in encoding.
        ignore_merges: whether BPE emits a whole word that is in the vocabulary without applying merges. User-defined
            words need this, because no sequence of merges produces them.
    """
    spec = proto.trainer_spec
    scored_pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    distinct_pieces = add_duplicate_suffixes([piece for piece, _ in scored_pieces], extra_pieces)
    # a score of -inf prevents the use of a piece in encoding
    scored_pieces += [(piece, float("-inf")) for piece in distinct_pieces]
    if spec.model_type != spec.BPE:
        return Unigram(scored_pieces, spec.unk_id, spec.byte_fallback)
    return BPE(
        {piece: token_id for token_id, (piece, _) in enumerate(scored_pieces)},
        derive_merges(proto),
        unk_token=spec.unk_piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        ignore_merges=ignore_merges,
    )


def add_duplicate_suffixes(first_pieces: Sequence[str], extra_pieces: Sequence[str]) -> list[str]:
    """Make the pieces of several languages distinct by appending `DUPLICATE_SUFFIX` to repeated pieces.

    Args:
        first_pieces: pieces of the first language, which are not changed.
        extra_pieces: pieces of the second and all further languages, in the order of their ids.

    Returns:
        `extra_pieces` with suffixes. A piece that occurs for the third time has two suffixes, and so on.
    """
    previous_pieces = set(first_pieces)
    distinct_pieces = []
    for piece in extra_pieces:
        while piece in previous_pieces:
            piece += DUPLICATE_SUFFIX
        previous_pieces.add(piece)
        distinct_pieces.append(piece)
    return distinct_pieces


def build_decoder(byte_fallback: bool) -> Any:
    """Build the decoder of a tokenizer, which removes duplicate suffixes, joins byte pieces, and restores spaces.

    Args:
        byte_fallback: whether the SentencePiece model encodes unknown characters as byte pieces such as `<0xE2>`.
    """
    byte_decoders = [decoders.ByteFallback(), decoders.Fuse()] if byte_fallback else []
    space_decoder = decoders.Metaspace(replacement=WORD_START, prepend_scheme="always")
    return decoders.Sequence([decoders.Replace(DUPLICATE_SUFFIX, ""), *byte_decoders, space_decoder])


def derive_merges(proto: Any) -> list[tuple[str, str]]:
    """Derive the BPE merges of a SentencePiece model from its pieces and scores, in the order of application.

    Args:
        proto: SentencePiece model, a `ModelProto`.
    """
    from transformers.convert_slow_tokenizer import generate_merges

    token_ids = {piece.piece: token_id for token_id, piece in enumerate(proto.pieces)}
    scored_pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return [(left, right) for left, right in generate_merges(token_ids, scored_pieces)]


def build_normalizer(spec: Any) -> Any:
    """Build the normaliser of a tokenizer from the `NormalizerSpec` of a SentencePiece model.

    As the spec requests, the normaliser applies the character map, removes superfluous spaces, and prepends the
    word-boundary marker `▁`. It then replaces every space with the marker.

    Args:
        spec: `NormalizerSpec` of the SentencePiece model.
    """
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(SPACES_PATTERN), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Replace(Regex(TEXT_START_PATTERN), WORD_START))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", WORD_START)])


def strip_duplicate_suffixes(pieces: Sequence[str]) -> list[str]:
    """Remove `DUPLICATE_SUFFIX` from the end of each piece, which restores the pieces of the SentencePiece models.

    Args:
        pieces: pieces of a tokenizer, in the order of their ids.
    """
    return [piece.rstrip(DUPLICATE_SUFFIX) for piece in pieces]


def get_sentencepiece_models(tokenizer: Any, num_labels: int) -> list[bytes]:
    """Return the SentencePiece models that a tokenizer was built from, or build a new model.

    A new model is built if the tokenizer stores no models, or if the pieces of the tokenizer have changed. It tokenizes
    text identically to the tokenizer.

    Args:
        tokenizer: a `ParakeetTokenizer`.
        num_labels: vocabulary size without the blank.

    Returns:
        Serialised SentencePiece models, one per language.

    Raises:
        NemoError: SentencePiece cannot tokenize text identically to the tokenizer.
    """
    encoded_models = tokenizer.init_kwargs.get(SENTENCEPIECE_MODELS_KEY) or []
    serialized_models = [base64.b64decode(encoded_model) for encoded_model in encoded_models]
    protos = [parse_sentencepiece(serialized_model) for serialized_model in serialized_models]
    model_pieces = [piece.piece for proto in protos for piece in proto.pieces]
    pieces = tokenizer.convert_ids_to_tokens(range(num_labels))
    if model_pieces and model_pieces == strip_duplicate_suffixes(pieces):
        return serialized_models
    return [build_sentencepiece(json.loads(tokenizer.backend_tokenizer.to_str()), pieces)]


def build_sentencepiece(backend: dict[str, Any], pieces: list[str]) -> bytes:
    """Build a SentencePiece model that tokenizes text identically to a BPE or unigram tokenizer.

    Args:
        backend: content of tokenizer.json.
        pieces: tokens of the tokenizer in the order of their ids, without the blank.

    Returns:
        The serialised SentencePiece model.

    Raises:
        NemoError: SentencePiece cannot tokenize text identically to the tokenizer.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    model, spec = backend["model"], proto.trainer_spec
    pre_tokenizer_type = (backend["pre_tokenizer"] or {}).get("type", "Metaspace")
    if pre_tokenizer_type != "Metaspace":
        raise NemoError(f"SentencePiece has no pre-tokenizer {pre_tokenizer_type}: train a SentencePiece model")
    if model["type"] not in ("BPE", "Unigram"):
        raise NemoError(
            f"a tokenizer for NeMo must be BPE or Unigram, got {model['type']}: train a SentencePiece model"
        )
    is_bpe = model["type"] == "BPE"
    unknown_piece = model["unk_token"] if is_bpe else pieces[model["unk_id"]]
    spec.model_type = spec.BPE if is_bpe else spec.UNIGRAM
    spec.byte_fallback = bool(model.get("byte_fallback"))
    spec.unk_piece, spec.unk_id, spec.vocab_size = unknown_piece, pieces.index(unknown_piece), len(pieces)
    # -1 means that the model has no such piece
    spec.bos_id = spec.eos_id = spec.pad_id = -1
    merges = [tuple(pair) for pair in model["merges"]] if is_bpe else []
    # pieces that no merge produces get the lowest score
    default_score = -float(len(merges))
    scores = dict.fromkeys(pieces, default_score) | (rank_merges(merges) if is_bpe else dict(model["vocab"]))
    add_pieces(proto, pieces, scores, {token["content"] for token in backend["added_tokens"]})
    fill_normalizer_spec(backend, proto.normalizer_spec)
    if is_bpe and derive_merges(proto) != merges:
        raise NemoError("SentencePiece cannot reproduce the merges of the tokenizer: train a SentencePiece model")
    return bytes(proto.SerializeToString())


def add_pieces(proto: Any, pieces: Sequence[str], scores: Mapping[str, float], user_defined: set[str]) -> None:
    """Add pieces with scores and types to a SentencePiece model.

    Args:
        proto: SentencePiece model, a `ModelProto`, changed in place. `trainer_spec.unk_piece` is the unknown piece.
        pieces: texts of the pieces in the order of their ids.
        scores: text of a piece -> score. The unknown piece and user-defined pieces always get the score 0.
        user_defined: texts of the user-defined pieces, which SentencePiece matches before it runs the model.
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
    """Score each piece that a merge produces by the negative rank of the first such merge, as in SentencePiece.

    Args:
        merges: pairs of pieces, in the order of application.
    """
    scores: dict[str, float] = {}
    for rank, pair in enumerate(merges):
        scores.setdefault("".join(pair), -float(rank))
    return scores


def fill_normalizer_spec(backend: dict[str, Any], spec: Any) -> None:
    """Convert the normaliser of a tokenizer to the `NormalizerSpec` of a SentencePiece model.

    This is the inverse of `build_normalizer`.

    Args:
        backend: content of tokenizer.json.
        spec: `NormalizerSpec`, changed in place.

    Raises:
        NemoError: SentencePiece does not support the normaliser.
    """
    normalizer = backend["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    unsupported_types = {step["type"] for step in steps} - {"Precompiled", "Replace", "Strip", "Prepend"}
    if unsupported_types:
        type_names = ", ".join(sorted(unsupported_types))
        raise NemoError(f"SentencePiece has no normalizer {type_names}: train a SentencePiece model")
    spec.precompiled_charsmap = b"".join(
        base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled"
    )
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Replace"]
    spec.remove_extra_whitespaces = SPACES_PATTERN in patterns
    # three ways to prepend the word-boundary marker: a replacement, a `Prepend` step, or the Metaspace pre-tokenizer
    has_prepend_step = any(step["type"] == "Prepend" for step in steps)
    prepend_scheme = (backend["pre_tokenizer"] or {}).get("prepend_scheme", "never")
    spec.add_dummy_prefix = TEXT_START_PATTERN in patterns or has_prepend_step or prepend_scheme != "never"


def build_vocabulary_files(serialized_model: bytes) -> tuple[bytes, bytes]:
    """Build the two vocabulary files that NeMo stores with a SentencePiece model.

    Args:
        serialized_model: bytes of `tokenizer.model`.

    Returns:
        Contents of `vocab.txt` and of `tokenizer.vocab`. `vocab.txt` has one piece per line, spelled as in WordPiece:
        `▁the` becomes `the`, and `ing` becomes `##ing`. `tokenizer.vocab` has one piece and its score per line.
    """
    pieces = parse_sentencepiece(serialized_model).pieces
    texts = [piece.piece for piece in pieces if piece.type not in (piece.UNKNOWN, piece.CONTROL)]
    wordpieces = [text[1:] if text.startswith(WORD_START) and len(text) > 1 else f"##{text}" for text in texts]
    scored_pieces = "".join(f"{piece.piece}\t{piece.score:g}\n" for piece in pieces)
    return "\n".join(wordpieces).encode(), scored_pieces.encode()

"""Change the vocabulary of a model before fine-tuning: add tokens, or replace the tokenizer.

SentencePiece models are parsed and converted in `nemo/sentencepiece.py`.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_parakeet import blank_of, kind_of
from ..nemo import build_tokenizer, get_sentencepiece_models, parse_sentencepiece
from ..processing_parakeet import ParakeetProcessor
from ..tokenization_parakeet import BLANK, WORD_START, ParakeetTokenizer

# in a list of source tokens: the new token has no source
NO_SOURCE = -1


def extend_vocabulary(model: Any, processor: ParakeetProcessor, new_tokens: Sequence[str]) -> None:
    """Add tokens to the vocabulary, before the blank.

    Embedding and output rows of the existing tokens are copied unchanged. Rows of new tokens are initialised to the
    mean of the existing rows. The tokenizer matches a new token wherever its text occurs, also inside words, as
    SentencePiece does with user-defined symbols.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: processor of the model; changed in place.
        new_tokens: texts of the tokens, without spaces and without `▁`, which stands for a space.

    Raises:
        ValueError: a token exists already or can never be matched, or the vocabulary cannot be extended.
    """
    num_labels = check_vocabulary(model, processor)
    check_new_tokens(new_tokens, processor.tokenizer.convert_ids_to_tokens(range(num_labels + 1)))
    models = get_sentencepiece_models(processor.tokenizer, num_labels)
    if len(models) > 1:
        raise ValueError(
            "an aggregate tokenizer cannot be extended: use `replace_tokenizer` with one SentencePiece model"
        )
    tokenizer = build_tokenizer([add_pieces(models[0], new_tokens)], kind_of(model.config))
    for token in new_tokens:
        if tokenizer.convert_tokens_to_ids(token) not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"the token {token!r} is never matched, because text is normalised first: give its NFKC form"
            )
    resize_vocabulary(model, [*range(num_labels), *[NO_SOURCE] * len(new_tokens)])
    set_tokenizer(model, processor, tokenizer)


def replace_tokenizer(
    model: Any, processor: ParakeetProcessor, tokenizer: str | Path | bytes | ParakeetTokenizer
) -> None:
    """Replace the vocabulary of a model.

    Embedding and output rows of pieces that both vocabularies have are copied unchanged, and so are those of the blank
    and of the durations. Rows of new pieces are initialised to the mean of the old rows.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: processor of the model; changed in place.
        tokenizer: path or bytes of a SentencePiece model, or a `ParakeetTokenizer` whose last token is the blank.

    Raises:
        ValueError: the last token of the tokenizer is not the blank, or the processor belongs to another model.
    """
    num_labels = check_vocabulary(model, processor)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = Path(tokenizer).read_bytes()
    if isinstance(tokenizer, bytes):
        tokenizer = build_tokenizer([tokenizer], kind_of(model.config))
    last_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    if last_token not in (BLANK, tokenizer.pad_token):
        raise ValueError(f"the last token must be the blank, got {last_token!r}: give the SentencePiece model itself")
    old_pieces = processor.tokenizer.convert_ids_to_tokens(range(num_labels))
    old_ids = {piece: old_id for old_id, piece in enumerate(old_pieces)}
    new_pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 1))
    resize_vocabulary(model, [old_ids.get(piece, NO_SOURCE) for piece in new_pieces])
    set_tokenizer(model, processor, tokenizer)


def check_vocabulary(model: Any, processor: ParakeetProcessor) -> int:
    """Check that the blank is the last token of the model and of the tokenizer.

    Args:
        model: the model.
        processor: processor of the model.

    Returns:
        The number of labels: tokens without the blank.

    Raises:
        ValueError: the blank is not the last token of both.
    """
    vocab_size, tokenizer_size = model.config.vocab_size, len(processor.tokenizer)
    blank_id = blank_of(model.config)
    if not blank_id == vocab_size - 1 == tokenizer_size - 1:
        raise ValueError(
            f"the blank must be the last of the {vocab_size} tokens of the model and of the {tokenizer_size} tokens of "
            f"the tokenizer, got the id {blank_id}: give the processor that belongs to the model"
        )
    # the ids below that of the blank are labels
    return blank_id


def check_new_tokens(new_tokens: Sequence[str], existing_tokens: Sequence[str]) -> None:
    """Refuse tokens that exist already, occur twice, or that text between spaces cannot contain.

    Args:
        new_tokens: tokens to add.
        existing_tokens: tokens of the vocabulary, the blank included.

    Raises:
        ValueError: a token is refused; the message names it.
    """
    known_tokens = set(existing_tokens)
    for token in new_tokens:
        if not token or token in known_tokens or WORD_START in token or token != token.strip():
            raise ValueError(
                f"a new token must be text without spaces and {WORD_START!r} that the vocabulary lacks, got {token!r}: "
                "omit it, or use `replace_tokenizer` with a newly trained SentencePiece model"
            )
        known_tokens.add(token)


def add_pieces(sentencepiece_model: bytes, tokens: Sequence[str]) -> bytes:
    """Return a SentencePiece model with user-defined symbols added at the end of its vocabulary.

    Args:
        sentencepiece_model: the serialised model.
        tokens: texts of the symbols.
    """
    proto = parse_sentencepiece(sentencepiece_model)
    for token in tokens:
        piece = proto.pieces.add(piece=token, score=0.0)
        piece.type = piece.USER_DEFINED
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def resize_vocabulary(model: Any, source_ids: Sequence[int]) -> None:
    """Rearrange the rows of every layer with one row per token, and the ids of suppressed tokens.

    Args:
        model: changed in place; its config is not changed.
        source_ids: for each new token, the old token whose row it takes, or `NO_SOURCE`; without the blank.
    """
    num_labels = model.config.vocab_size - 1
    renumber_suppressed_tokens(model.generation_config, source_ids, num_labels)
    layers = [model.ctc_head] if hasattr(model, "ctc_head") else []
    if hasattr(model, "joint"):
        layers += [model.joint.head, model.decoder.embedding]
    for layer in layers:
        for name in ("weight", "bias"):
            old = getattr(layer, name, None)
            if old is not None:
                new_rows = rearrange_rows(old.detach(), source_ids, num_labels)
                setattr(layer, name, nn.Parameter(new_rows, old.requires_grad))
        num_rows = len(layer.weight)
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = num_rows
        elif isinstance(layer, nn.Linear):
            layer.out_features = num_rows
        else:
            # the CTC head is a convolution of width 1
            layer.out_channels = num_rows


def renumber_suppressed_tokens(generation_config: Any, source_ids: Sequence[int], num_labels: int) -> None:
    """Renumber suppressed tokens, so that the same outputs stay suppressed; removed tokens are dropped.

    TDT checkpoints of stock transformers suppress the duration outputs, whose ids follow that of the blank.

    Args:
        generation_config: changed in place.
        source_ids: for each new token, the id that it had in the old vocabulary, or `NO_SOURCE` if it was not in it;
            without the blank.
        num_labels: number of old tokens without the blank.
    """
    new_ids = {old_id: new_id for new_id, old_id in enumerate(source_ids) if old_id != NO_SOURCE}
    shift = len(source_ids) - num_labels
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        suppressed_ids = getattr(generation_config, name, None)
        if suppressed_ids:
            renumbered = []
            for old_id in suppressed_ids:
                if old_id >= num_labels:
                    # the blank and the durations follow the last label
                    renumbered.append(old_id + shift)
                elif old_id in new_ids:
                    renumbered.append(new_ids[old_id])
            setattr(generation_config, name, renumbered or None)


def rearrange_rows(rows: Tensor, source_ids: Sequence[int], num_labels: int) -> Tensor:
    """Copy the rows of tokens to their new positions, and append the rows of the blank and the durations.

    Args:
        rows: (V + D, ...) rows of a layer: one per token with the blank, then one per duration.
        source_ids: for each new token, the id of the old token whose row it gets, or `NO_SOURCE`; without the blank.
        num_labels: number of old tokens without the blank.

    Returns:
        The new rows; a token without a source gets the mean of the rows of the old tokens.
    """
    sources = torch.tensor(source_ids, device=rows.device)
    new_rows = rows[sources.clamp(min=0)]
    new_rows[sources == NO_SOURCE] = rows[:num_labels].mean(0)
    return torch.cat([new_rows, rows[num_labels:]])


def set_tokenizer(model: Any, processor: ParakeetProcessor, tokenizer: ParakeetTokenizer) -> None:
    """Give the processor a new tokenizer, and update vocabulary size and special ids in all configurations.

    Args:
        model: its `config` and `generation_config` are changed in place.
        processor: changed in place.
        tokenizer: the new tokenizer; its last token is the blank.
    """
    vocab_size = len(tokenizer)
    new_values = {
        "vocab_size": vocab_size,
        "blank_token_id": vocab_size - 1,
        "decoder_start_token_id": vocab_size - 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    for config in (model.config, model.generation_config):
        for name, value in new_values.items():
            # not every kind of model has all fields
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
    processor.tokenizer = tokenizer
    processor.blank_token_id = vocab_size - 1
    # a CTC processor has no blank token: its blank is the pad token
    if kind_of(model.config) != "ctc":
        processor.blank_token = tokenizer.convert_ids_to_tokens(vocab_size - 1)
    clear_cached_properties(processor)


def clear_cached_properties(instance: Any) -> None:
    """Delete the stored values of all `cached_property` attributes of an object, so that they are computed again."""
    for cls in type(instance).__mro__:
        for name, attribute in vars(cls).items():
            if isinstance(attribute, cached_property):
                instance.__dict__.pop(name, None)


__all__ = ["extend_vocabulary", "replace_tokenizer"]

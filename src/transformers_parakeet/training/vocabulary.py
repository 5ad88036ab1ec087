"""Change the vocabulary of a model before fine-tuning: add tokens, or replace the tokenizer.

SentencePiece models are parsed and converted to tokenizers in `nemo/sentencepiece.py`.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_parakeet import get_blank_id, get_head_type
from ..nemo import build_tokenizer, get_sentencepiece_models, parse_sentencepiece
from ..processing_parakeet import ParakeetProcessor
from ..tokenization_parakeet import BLANK, WORD_START, ParakeetTokenizer

# source id of a new token that is not in the old vocabulary
NO_SOURCE = -1


def extend_vocabulary(model: Any, processor: ParakeetProcessor, new_tokens: Sequence[str]) -> None:
    """Add tokens to the vocabulary of a model and its tokenizer, directly before the blank.

    Embedding and output rows of existing tokens are copied unchanged. Rows of new tokens are initialised to the mean of
    the existing rows. New tokens are user-defined symbols of SentencePiece, so the tokenizer matches them wherever they
    occur in the text, even inside words.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: processor of the model; changed in place.
        new_tokens: the tokens to add; they must not contain spaces or `▁`, which represents a space.

    Raises:
        ValueError: a token already exists or can never be matched; or the tokenizer is an aggregate tokenizer or does
            not belong to the model.
    """
    num_labels = check_vocabulary(model, processor)
    check_new_tokens(new_tokens, processor.tokenizer.convert_ids_to_tokens(range(num_labels + 1)))
    models = get_sentencepiece_models(processor.tokenizer, num_labels)
    if len(models) > 1:
        raise ValueError(
            "an aggregate tokenizer cannot be extended: use `replace_tokenizer` with one SentencePiece model"
        )
    tokenizer = build_tokenizer([add_pieces(models[0], new_tokens)], get_head_type(model.config))
    for token in new_tokens:
        if tokenizer.convert_tokens_to_ids(token) not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"the token {token!r} can never be matched, because the tokenizer normalises text to NFKC: use the "
                "NFKC form of the token"
            )
    resize_vocabulary(model, [*range(num_labels), *[NO_SOURCE] * len(new_tokens)])
    set_tokenizer(model, processor, tokenizer)


def replace_tokenizer(
    model: Any, processor: ParakeetProcessor, tokenizer: str | Path | bytes | ParakeetTokenizer
) -> None:
    """Replace the tokenizer of a processor, and adapt the vocabulary of the model.

    Embedding and output rows of shared pieces, of the blank and of the durations are copied unchanged. Rows of new
    pieces are initialised to the mean of the old rows.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: processor of the model; changed in place.
        tokenizer: path or serialised bytes of a SentencePiece model, or a `ParakeetTokenizer` whose last token is the
            blank.

    Raises:
        ValueError: the last token of the tokenizer is not the blank, or the processor belongs to another model.
    """
    num_labels = check_vocabulary(model, processor)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = Path(tokenizer).read_bytes()
    if isinstance(tokenizer, bytes):
        tokenizer = build_tokenizer([tokenizer], get_head_type(model.config))
    last_token = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    if last_token not in (BLANK, tokenizer.pad_token):
        raise ValueError(
            f"the last token of `tokenizer` must be the blank, got {last_token!r}: pass the SentencePiece model instead"
        )
    old_pieces = processor.tokenizer.convert_ids_to_tokens(range(num_labels))
    old_ids = {piece: old_id for old_id, piece in enumerate(old_pieces)}
    new_pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 1))
    resize_vocabulary(model, [old_ids.get(piece, NO_SOURCE) for piece in new_pieces])
    set_tokenizer(model, processor, tokenizer)


def check_vocabulary(model: Any, processor: ParakeetProcessor) -> int:
    """Check that a model and its tokenizer have equal vocabulary sizes, and that the last token is the blank.

    Args:
        model: a Parakeet model.
        processor: processor of the model.

    Returns:
        The number of labels, which is the vocabulary size without the blank.

    Raises:
        ValueError: the sizes differ, or the blank is not the last token.
    """
    vocab_size, tokenizer_size = model.config.vocab_size, len(processor.tokenizer)
    blank_id = get_blank_id(model.config)
    if not blank_id == vocab_size - 1 == tokenizer_size - 1:
        raise ValueError(
            f"the blank must be the last token, got blank id {blank_id}, {vocab_size} tokens in the model and "
            f"{tokenizer_size} tokens in the tokenizer: pass the processor that belongs to the model"
        )
    # the blank is the last token, so its id is the number of labels
    return blank_id


def check_new_tokens(new_tokens: Sequence[str], existing_tokens: Sequence[str]) -> None:
    """Check that new tokens are unique, not in the vocabulary yet, and free of spaces.

    Args:
        new_tokens: tokens to add.
        existing_tokens: all tokens of the vocabulary, including the blank.

    Raises:
        ValueError: a token is empty, a duplicate, or contains a leading or trailing space or `▁`.
    """
    known_tokens = set(existing_tokens)
    for token in new_tokens:
        if not token or token in known_tokens or WORD_START in token or token != token.strip():
            raise ValueError(
                f"a new token must not be in the vocabulary, and must not contain spaces or {WORD_START!r}, got "
                f"{token!r}: omit it, or use `replace_tokenizer` with a newly trained SentencePiece model"
            )
        known_tokens.add(token)


def add_pieces(sentencepiece_model: bytes, tokens: Sequence[str]) -> bytes:
    """Append user-defined symbols to the vocabulary of a SentencePiece model.

    Args:
        sentencepiece_model: serialised SentencePiece model.
        tokens: the symbols to append.

    Returns:
        The serialised SentencePiece model with the new symbols.
    """
    proto = parse_sentencepiece(sentencepiece_model)
    for token in tokens:
        piece = proto.pieces.add(piece=token, score=0.0)
        piece.type = piece.USER_DEFINED
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def resize_vocabulary(model: Any, source_ids: Sequence[int]) -> None:
    """Rebuild the weights of all vocabulary layers (embedding, joint output, CTC head) for a new vocabulary.

    The ids of suppressed tokens in the generation config are renumbered as well.

    Args:
        model: a Parakeet model; changed in place, except for `model.config`.
        source_ids: for each token of the new vocabulary without the blank, the id of the same token in the old
            vocabulary; `NO_SOURCE` for a token that is not in the old vocabulary.
    """
    num_labels = model.config.vocab_size - 1
    renumber_suppressed_tokens(model.generation_config, source_ids, num_labels)
    layers = [model.ctc_head] if hasattr(model, "ctc_head") else []
    if hasattr(model, "joint"):
        layers += [model.joint.head, model.decoder.embedding]
    for layer in layers:
        for name in ("weight", "bias"):
            old_parameter = getattr(layer, name, None)
            if old_parameter is not None:
                new_rows = rearrange_rows(old_parameter.detach(), source_ids, num_labels)
                setattr(layer, name, nn.Parameter(new_rows, old_parameter.requires_grad))
        # each class of layer states its size in a different attribute
        num_rows = len(layer.weight)
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = num_rows
        elif isinstance(layer, nn.Linear):
            layer.out_features = num_rows
        else:
            # the CTC head is a convolution with kernel size 1
            layer.out_channels = num_rows


def renumber_suppressed_tokens(generation_config: Any, source_ids: Sequence[int], num_labels: int) -> None:
    """Convert the ids of suppressed tokens from the old vocabulary to the new vocabulary.

    TDT checkpoints of stock transformers suppress the duration outputs, whose ids follow the blank id. Ids of tokens
    that are not in the new vocabulary are dropped.

    Args:
        generation_config: generation config of the model; changed in place.
        source_ids: for each token of the new vocabulary without the blank, the id of the same token in the old
            vocabulary; `NO_SOURCE` for a token that is not in the old vocabulary.
        num_labels: size of the old vocabulary without the blank.
    """
    new_ids = {old_id: new_id for new_id, old_id in enumerate(source_ids) if old_id != NO_SOURCE}
    shift = len(source_ids) - num_labels
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        suppressed_ids = getattr(generation_config, name, None)
        if suppressed_ids:
            new_suppressed_ids = []
            for old_id in suppressed_ids:
                if old_id >= num_labels:
                    # the ids of the blank and the durations follow the labels, so they shift with the number of labels
                    new_suppressed_ids.append(old_id + shift)
                elif old_id in new_ids:
                    new_suppressed_ids.append(new_ids[old_id])
            setattr(generation_config, name, new_suppressed_ids or None)


def rearrange_rows(rows: Tensor, source_ids: Sequence[int], num_labels: int) -> Tensor:
    """Rearrange the rows of a weight or bias for a new vocabulary.

    Args:
        rows: (num_outputs, ...) old rows: the labels, then the blank, then the durations of a TDT model.
        source_ids: for each token of the new vocabulary without the blank, the id of the same token in the old
            vocabulary; `NO_SOURCE` for a token that is not in the old vocabulary.
        num_labels: size of the old vocabulary without the blank.

    Returns:
        The new rows in the order labels, blank, durations. The row of a new token is the mean of the old label rows;
        all other rows are copied.
    """
    sources = torch.tensor(source_ids, device=rows.device)
    # `clamp` gives new tokens an arbitrary valid row, which the next line overwrites
    new_rows = rows[sources.clamp(min=0)]
    new_rows[sources == NO_SOURCE] = rows[:num_labels].mean(0)
    return torch.cat([new_rows, rows[num_labels:]])


def set_tokenizer(model: Any, processor: ParakeetProcessor, tokenizer: ParakeetTokenizer) -> None:
    """Set the tokenizer of a processor, and update the vocabulary size and special token ids in all configurations.

    Args:
        model: a Parakeet model; `model.config` and `model.generation_config` are changed in place.
        processor: processor of the model; changed in place.
        tokenizer: the new tokenizer; the last token must be the blank.
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
            # not every model type has all of these fields
            if getattr(config, name, None) is not None:
                setattr(config, name, value)
    processor.tokenizer = tokenizer
    processor.blank_token_id = vocab_size - 1
    # a CTC processor has no `blank_token`, because CTC models use the pad token as the blank
    if get_head_type(model.config) != "ctc":
        processor.blank_token = tokenizer.convert_ids_to_tokens(vocab_size - 1)
    clear_cached_properties(processor)


def clear_cached_properties(instance: Any) -> None:
    """Clear the cached values of all `cached_property` attributes of an object.

    Args:
        instance: the object; changed in place.
    """
    for cls in type(instance).__mro__:
        for name, attribute in vars(cls).items():
            if isinstance(attribute, cached_property):
                instance.__dict__.pop(name, None)


__all__ = ["extend_vocabulary", "replace_tokenizer"]

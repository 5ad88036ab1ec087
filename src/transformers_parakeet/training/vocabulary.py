"""Changes the vocabulary of a model for fine-tuning: more tokens, or another tokenizer; what was learnt stays.

SentencePiece models are built and read in `subwords.py`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_parakeet import blank_of, kind_of
from ..nemo import build_tokenizer, parse_sentencepiece, sentencepiece_models
from ..processing_parakeet import ParakeetProcessor, find_blank_id
from ..tokenization_parakeet import BLANK, WORD_START, ParakeetTokenizer


def extend_vocabulary(model: Any, processor: ParakeetProcessor, new_tokens: Sequence[str]) -> None:
    """Add tokens before the blank; the rows of the others keep their values, bit for bit.

    A new token is matched as a whole wherever its text occurs, inside words, too, as SentencePiece does with symbols
    that users define. New rows are the mean of the rows of the old tokens.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: its processor; changed in place.
        new_tokens: their texts, without the `▁` that stands for a space.

    Raises:
        ValueError: a token is known already, cannot be matched, or would change how NeMo's vocabulary is laid out.
    """
    labels = check_layout(model, processor)
    known = set(processor.tokenizer.convert_ids_to_tokens(range(labels + 1)))
    for token in new_tokens:
        if not token or token in known or WORD_START in token or token != token.strip():
            raise ValueError(
                f"a new token must be text without spaces and {WORD_START!r} that the vocabulary lacks, got {token!r}: "
                "leave it out, or use `replace_tokenizer` with a newly trained SentencePiece model"
            )
        known.add(token)
    models = sentencepiece_models(processor.tokenizer, labels)
    if len(models) > 1:
        raise ValueError(
            "an aggregate tokenizer cannot be extended: use `replace_tokenizer` with one SentencePiece model"
        )
    tokenizer = build_tokenizer([with_pieces(models[0], new_tokens)], kind_of(model.config))
    for token in new_tokens:
        if tokenizer.convert_tokens_to_ids(token) not in tokenizer(token, add_special_tokens=False)["input_ids"]:
            raise ValueError(
                f"the token {token!r} is never matched, because text is normalised first: give its NFKC form"
            )
    rearrange(model, [*range(labels), *[-1] * len(new_tokens)])
    adopt(model, processor, tokenizer)


def replace_tokenizer(
    model: Any, processor: ParakeetProcessor, tokenizer: str | Path | bytes | ParakeetTokenizer
) -> None:
    """Give a model another vocabulary; pieces that the old one has, too, keep the values of their rows, bit for bit.

    The blank keeps its rows and stays last, and so do durations. Rows of new pieces are the mean of the old rows.

    Args:
        model: a `ParakeetForCTC`, `ParakeetForRNNT` or `ParakeetForTDT`; changed in place.
        processor: its processor; changed in place.
        tokenizer: a SentencePiece model, as a path or its bytes, or a `ParakeetTokenizer` whose blank is last.

    Raises:
        ValueError: the tokenizer is none of these.
    """
    labels = check_layout(model, processor)
    if isinstance(tokenizer, (str, Path)):
        tokenizer = Path(tokenizer).read_bytes()
    if isinstance(tokenizer, bytes):
        tokenizer = build_tokenizer([tokenizer], kind_of(model.config))
    blank = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
    if blank not in (BLANK, tokenizer.pad_token):
        raise ValueError(f"the last token must be the blank, got {blank!r}: give the SentencePiece model itself")
    old = {piece: index for index, piece in enumerate(processor.tokenizer.convert_ids_to_tokens(range(labels)))}
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 1))
    rearrange(model, [old.get(piece, -1) for piece in pieces])
    adopt(model, processor, tokenizer)


def check_layout(model: Any, processor: ParakeetProcessor) -> int:
    """Return the number of tokens before the blank, which must be last in the model and in the tokenizer."""
    config = model.config
    blank = blank_of(config)
    if not blank == config.vocab_size - 1 == len(processor.tokenizer) - 1:
        raise ValueError(
            f"the blank must be the last of the model's {config.vocab_size} tokens and of the tokenizer's "
            f"{len(processor.tokenizer)}, it is {blank}: give the processor that belongs to the model"
        )
    return blank


def with_pieces(model: bytes, tokens: Sequence[str]) -> bytes:
    """Return a SentencePiece model with more pieces at its end."""
    proto = parse_sentencepiece(model)
    for token in tokens:
        piece = proto.pieces.add(piece=token, score=0.0)
        piece.type = piece.USER_DEFINED
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def rearrange(model: Any, sources: Sequence[int]) -> None:
    """Reorder the rows of every layer that has one row per token, and the ids of suppressed tokens.

    Args:
        model: changed in place.
        sources: for each new token the old one whose row it gets, -1 for a row of its own; the blank is not among them.
    """
    labels = model.config.vocab_size - 1
    move_suppressed_tokens(model.generation_config, sources, labels)
    layers = [model.ctc_head] if hasattr(model, "ctc_head") else []
    if hasattr(model, "joint"):
        layers += [model.joint.head, model.decoder.embedding]
    for layer in layers:
        for name in ("weight", "bias"):
            rows = getattr(layer, name, None)
            if rows is not None:
                setattr(layer, name, nn.Parameter(laid_out(rows.detach(), sources, labels), rows.requires_grad))
        if isinstance(layer, nn.Embedding):
            layer.num_embeddings = len(layer.weight)
        elif isinstance(layer, nn.Linear):
            layer.out_features = len(layer.weight)
        else:
            layer.out_channels = len(layer.weight)


def move_suppressed_tokens(generation_config: Any, sources: Sequence[int], labels: int) -> None:
    """Make the lists of suppressed tokens name the same outputs as before; the ids of removed tokens are deleted.

    Stock TDT checkpoints suppress the duration outputs, whose ids follow that of the blank.

    Args:
        generation_config: changed in place.
        sources: see `rearrange`.
        labels: number of old tokens before the blank.
    """
    moved = {old: new for new, old in enumerate(sources) if old >= 0}
    shift = len(sources) - labels
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        old_ids = getattr(generation_config, name, None)
        if old_ids:
            new_ids = [index + shift if index >= labels else moved.get(index, -1) for index in old_ids]
            setattr(generation_config, name, [index for index in new_ids if index >= 0] or None)


def laid_out(rows: Tensor, sources: Sequence[int], labels: int) -> Tensor:
    """Return rows in their new order, followed by those of the blank and of durations."""
    order = torch.tensor(sources, device=rows.device)
    new = rows[order.clamp(min=0)]
    new[order < 0] = rows[:labels].mean(0)
    return torch.cat([new, rows[labels:]])


def adopt(model: Any, processor: ParakeetProcessor, tokenizer: ParakeetTokenizer) -> None:
    """Let configuration, generation configuration and processor follow the tokenizer."""
    blank = len(tokenizer) - 1
    for config in (model.config, model.generation_config):
        # each config has those of these that its kind of model knows
        for name in ("vocab_size", "blank_token_id", "decoder_start_token_id"):
            if getattr(config, name, None) is not None:
                setattr(config, name, blank + (name == "vocab_size"))
        if getattr(config, "pad_token_id", None) is not None:
            config.pad_token_id = tokenizer.pad_token_id
    processor.tokenizer = tokenizer
    processor.blank_token_id = find_blank_id(tokenizer, processor.blank_token)
    # computed from the vocabulary when they are first asked for
    for name in ("punctuation", "_space_before_punctuation"):
        processor.__dict__.pop(name, None)


__all__ = ["extend_vocabulary", "replace_tokenizer"]

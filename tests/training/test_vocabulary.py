"""More tokens and other tokenizers: old rows keep their values, the blank stays last, training goes on."""

import base64

import pytest
import torch
from conftest import TESTS, noise
from training_helpers import arguments

from transformers_parakeet import export_nemo, extend_vocabulary, load_nemo, replace_tokenizer
from transformers_parakeet.nemo.reader import load_folder
from transformers_parakeet.nemo.sentencepiece import MODELS, build_tokenizer
from transformers_parakeet.training.trainer import ParakeetTrainer

GOLDEN = TESTS / "golden"
KINDS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc"]
NEW = ["ö", "ß", "straße", "<|de|>"]


def layers(model):
    """Every tensor with one row per token, by name."""
    names = ("ctc_head.weight", "ctc_head.bias", "joint.head.weight", "joint.head.bias", "decoder.embedding.weight")
    return {name: value.clone() for name, value in model.state_dict().items() if name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_old_rows_stay_and_the_blank_is_last(kind, tmp_path):
    model, processor = load_nemo(GOLDEN / kind / "model.nemo")
    before, labels = layers(model), model.config.vocab_size - 1
    rest = {key: value.clone() for key, value in model.state_dict().items() if key not in before}
    heard = model.generate(**processor(noise(2.0), sampling_rate=16000))
    extend_vocabulary(model, processor, NEW)
    after = layers(model)
    assert before.keys() == after.keys()
    for name, old in before.items():
        new = after[name]
        assert len(new) == len(old) + len(NEW)
        assert torch.equal(new[:labels], old[:labels])
        # the blank, and after it the durations
        assert torch.equal(new[labels + len(NEW) :], old[labels:])
        assert torch.equal(new[labels : labels + len(NEW)], old[:labels].mean(0).expand(len(NEW), *old.shape[1:]))
    assert all(torch.equal(model.state_dict()[key], value) for key, value in rest.items())
    blank = labels + len(NEW)
    assert model.config.vocab_size == blank + 1 == len(processor.tokenizer)
    assert (model.config.pad_token_id if kind == "ctc" else model.config.blank_token_id) == blank
    assert processor.tokenizer.convert_tokens_to_ids(NEW) == list(range(labels, blank))
    assert processor.tokenizer("eine straße, größe", add_special_tokens=False)["input_ids"].count(labels + 2) == 1
    again = model.generate(**processor(noise(2.0), sampling_rate=16000))
    old, new = (out if torch.is_tensor(out) else out.sequences for out in (heard, again))
    # nothing but the number of the blank changes: the mean of all rows never wins here
    assert torch.equal(torch.where(old == labels, blank, old), new)
    check_training_and_files(model, processor, tmp_path)


def check_training_and_files(model, processor, folder):
    """Train a step, and take the result through both kinds of files."""
    inputs = processor([noise(4.0)], text=["größe straße"], sampling_rate=16000)
    ids = inputs["labels"][0].tolist()
    assert {processor.tokenizer.convert_tokens_to_ids("ö"), processor.tokenizer.convert_tokens_to_ids("straße")} <= set(
        ids
    )
    loss = model.train()(**{k: v for k, v in inputs.items() if k != "decoder_input_ids"}).loss
    loss.backward()
    assert loss.isfinite()
    head = model.ctc_head if hasattr(model, "ctc_head") else model.joint.head
    assert head.weight.grad[ids[0]].abs().sum() > 0
    model.eval().save_pretrained(folder / "folder")
    processor.save_pretrained(folder / "folder")
    export_nemo(model, processor, folder / "model.nemo")
    for again, other in (load_folder(folder / "folder"), load_nemo(folder / "model.nemo")):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
        assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert other.tokenizer("größe straße", add_special_tokens=False)["input_ids"] == ids
        assert other.tokenizer.decode(ids, group_tokens=False) == "größe straße"


@pytest.mark.parametrize("kind", KINDS)
def test_another_tokenizer_keeps_the_rows_of_pieces_that_stay(kind, tmp_path):
    model, processor = load_nemo(GOLDEN / kind / "model.nemo")
    before, labels = layers(model), model.config.vocab_size - 1
    old = processor.tokenizer.convert_ids_to_tokens(range(labels))
    second = load_nemo(GOLDEN / "tdt_agg_tokenizer" / "model.nemo")[1].tokenizer.init_kwargs[MODELS][1]
    path = tmp_path / "german.model"
    path.write_bytes(base64.b64decode(second))
    replace_tokenizer(model, processor, path)
    pieces = processor.tokenizer.convert_ids_to_tokens(range(model.config.vocab_size - 1))
    assert pieces == build_tokenizer([path.read_bytes()], kind).convert_ids_to_tokens(range(64))
    both = [piece for piece in pieces if piece in old]
    assert 20 < len(both) < 64
    for name, new in layers(model).items():
        assert torch.equal(new[64:], before[name][labels:])
        for piece in both:
            assert torch.equal(new[pieces.index(piece)], before[name][old.index(piece)]), piece
        novel = [index for index, piece in enumerate(pieces) if piece not in old]
        assert torch.equal(new[novel[0]], before[name][:labels].mean(0))
    out = model.generate(**processor(noise(2.0), sampling_rate=16000))
    assert int((out if torch.is_tensor(out) else out.sequences).max()) <= 64
    export_nemo(model, processor, tmp_path / "german.nemo")
    again, other = load_nemo(tmp_path / "german.nemo")
    assert other.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())


def test_punctuation_follows_the_vocabulary():
    model, processor = load_nemo(GOLDEN / "tdt" / "model.nemo")
    assert "¿" not in processor.punctuation
    extend_vocabulary(model, processor, ["¿"])
    assert "¿" in processor.punctuation


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (["the", "the"], "got 'the'"),
        (["he"], "the vocabulary lacks, got 'he'"),
        (["▁neu"], "got '▁neu'"),
        ([" neu"], "got ' neu'"),
        ([""], "got ''"),
        (["<blank>"], "got '<blank>'"),
    ],
)
def test_tokens_that_cannot_be_added(tokens, words):
    model, processor = load_nemo(GOLDEN / "tdt" / "model.nemo")
    with pytest.raises(ValueError, match=words):
        extend_vocabulary(model, processor, tokens)
    assert model.config.vocab_size == len(processor.tokenizer) == 129


def test_a_token_that_is_normalised_away():
    # its SentencePiece model has the nmt_nfkc table
    model, processor = load_nemo(GOLDEN / "ctc" / "model.nemo")
    with pytest.raises(ValueError, match=r"'ﬁ' is never matched.*NFKC"):
        extend_vocabulary(model, processor, ["ﬁ"])
    assert model.ctc_head.weight.shape[0] == 129


def test_an_aggregate_and_a_foreign_processor_are_refused():
    model, processor = load_nemo(GOLDEN / "tdt_agg_tokenizer" / "model.nemo")
    with pytest.raises(ValueError, match="aggregate tokenizer cannot be extended"):
        extend_vocabulary(model, processor, ["ö1"])
    with pytest.raises(ValueError, match="give the processor that belongs to the model"):
        extend_vocabulary(model, load_nemo(GOLDEN / "tdt" / "model.nemo")[1], ["ö1"])


def suppressing(kind="tdt"):
    """A model whose generation configuration suppresses the duration outputs, as stock TDT checkpoints do."""
    model, processor = load_nemo(GOLDEN / kind / "model.nemo")
    size, durations = model.config.vocab_size, len(model.config.durations)
    model.generation_config.suppress_tokens = list(range(size, size + durations))
    return model, processor


def test_suppressed_duration_outputs_move_with_a_longer_vocabulary(tmp_path):
    model, processor = suppressing()
    extend_vocabulary(model, processor, NEW)
    size, durations = model.config.vocab_size, len(model.config.durations)
    assert model.generation_config.suppress_tokens == list(range(size, size + durations))
    inputs = processor(noise(2.0), sampling_rate=16000)
    sequences = model.generate(**inputs).sequences
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = load_folder(tmp_path)[0]
    assert again.generation_config.suppress_tokens == list(range(size, size + durations))
    assert torch.equal(again.generate(**inputs).sequences, sequences)


def test_suppressed_tokens_follow_another_tokenizer():
    model, processor = suppressing()
    labels = model.config.vocab_size - 1
    old = processor.tokenizer.convert_ids_to_tokens(range(labels))
    second = load_nemo(GOLDEN / "tdt_agg_tokenizer" / "model.nemo")[1].tokenizer.init_kwargs[MODELS][1]
    other = build_tokenizer([base64.b64decode(second)], "tdt")
    pieces = other.convert_ids_to_tokens(range(len(other) - 1))
    stays = next(piece for piece in old[3:] if piece in pieces and pieces.index(piece) != old.index(piece))
    leaves = next(piece for piece in old if piece not in pieces)
    durations = model.generation_config.suppress_tokens
    model.generation_config.suppress_tokens = [old.index(stays), old.index(leaves), *durations]
    model.generation_config.begin_suppress_tokens = [old.index(leaves)]
    replace_tokenizer(model, processor, other)
    size = model.config.vocab_size
    assert size != labels + 1
    moved = [pieces.index(stays), *range(size, size + len(durations))]
    assert model.generation_config.suppress_tokens == moved
    assert model.generation_config.begin_suppress_tokens is None


def test_a_model_with_suppressed_durations_and_new_tokens_is_evaluated(tmp_path):
    model, processor = suppressing()
    extend_vocabulary(model, processor, NEW)
    rows = [{"audio": noise(1.0), "text": "the"}]
    trainer = ParakeetTrainer(model, arguments(tmp_path, 1), eval_dataset=rows, processing_class=processor)
    assert trainer.evaluate()["eval_loss"] > 0

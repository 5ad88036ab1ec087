"""Added tokens and replaced tokenizers: existing rows are unchanged, the blank stays last, and training works."""

import pytest
import torch
from conftest import TESTS, noise
from training_helpers import training_arguments

from transformers_parakeet import demo_model_path, export_nemo, extend_vocabulary, load_nemo, replace_tokenizer
from transformers_parakeet.nemo import build_tokenizer, get_sentencepiece_models
from transformers_parakeet.training import ParakeetTrainer

GOLDEN = TESTS / "golden"
KINDS = ["ctc", "rnnt", "tdt", "hybrid_tdt_ctc"]
NEW_TOKENS = ["ö", "ß", "straße", "<|de|>"]
VOCABULARY_TENSORS = (
    "ctc_head.weight",
    "ctc_head.bias",
    "joint.head.weight",
    "joint.head.bias",
    "decoder.embedding.weight",
)


def load_golden(name):
    """Return model and processor of a golden `.nemo` file."""
    return load_nemo(GOLDEN / name / "model.nemo")


def copy_vocabulary_tensors(model):
    """Return copies of every tensor with one row per token, by name."""
    return {name: value.clone() for name, value in model.state_dict().items() if name in VOCABULARY_TENSORS}


def german_sentencepiece_model():
    """Return the second SentencePiece model of a golden aggregate tokenizer; it has 64 pieces."""
    tokenizer = load_golden("tdt_agg_tokenizer")[1].tokenizer
    return get_sentencepiece_models(tokenizer, len(tokenizer) - 1)[1]


def generate_sequences(model, inputs):
    """Return the generated sequences of any kind of model as a tensor."""
    output = model.generate(**inputs)
    return output if torch.is_tensor(output) else output.sequences


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_leave_existing_rows_unchanged_and_the_blank_last(kind, tmp_path):
    model, processor = load_golden(kind)
    before, num_labels = copy_vocabulary_tensors(model), model.config.vocab_size - 1
    other_weights = {name: value.clone() for name, value in model.state_dict().items() if name not in before}
    inputs = processor(noise(2.0), sampling_rate=16000)
    sequences_before = generate_sequences(model, inputs)
    extend_vocabulary(model, processor, NEW_TOKENS)
    after = copy_vocabulary_tensors(model)
    assert before.keys() == after.keys()
    num_new = len(NEW_TOKENS)
    for name, old in before.items():
        new = after[name]
        assert len(new) == len(old) + num_new
        assert torch.equal(new[:num_labels], old[:num_labels])
        # rows of the blank and of the durations
        assert torch.equal(new[num_labels + num_new :], old[num_labels:])
        mean_row = old[:num_labels].mean(0)
        assert torch.equal(new[num_labels : num_labels + num_new], mean_row.expand(num_new, *old.shape[1:]))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in other_weights.items())
    blank_id = num_labels + num_new
    assert model.config.vocab_size == blank_id + 1 == len(processor.tokenizer)
    assert (model.config.pad_token_id if kind == "ctc" else model.config.blank_token_id) == blank_id
    assert processor.tokenizer.convert_tokens_to_ids(NEW_TOKENS) == list(range(num_labels, blank_id))
    ids = processor.tokenizer("eine straße, größe", add_special_tokens=False)["input_ids"]
    assert ids.count(num_labels + NEW_TOKENS.index("straße")) == 1
    # only the id of the blank changes: a row that is the mean of all rows never has the highest score here
    expected = torch.where(sequences_before == num_labels, blank_id, sequences_before)
    assert torch.equal(expected, generate_sequences(model, inputs))
    check_training_and_saving(model, processor, tmp_path)


def check_training_and_saving(model, processor, folder):
    """Check that new tokens get gradients, and that folders and `.nemo` files keep weights and tokenizer."""
    inputs = processor([noise(4.0)], text=["größe straße"], sampling_rate=16000)
    ids = inputs["labels"][0].tolist()
    new_ids = {processor.tokenizer.convert_tokens_to_ids(token) for token in ("ö", "straße")}
    assert new_ids <= set(ids)
    inputs.pop("decoder_input_ids", None)
    loss = model.train()(**inputs).loss
    loss.backward()
    assert loss.isfinite()
    head = model.ctc_head if hasattr(model, "ctc_head") else model.joint.head
    assert head.weight.grad[ids[0]].abs().sum() > 0
    model.eval().save_pretrained(folder / "folder")
    processor.save_pretrained(folder / "folder")
    export_nemo(model, processor, folder / "model.nemo")
    for path in (folder / "folder", folder / "model.nemo"):
        loaded_model, loaded_processor = load_nemo(path)
        expected_weights = model.state_dict()
        assert all(torch.equal(value, expected_weights[name]) for name, value in loaded_model.state_dict().items())
        tokenizer = loaded_processor.tokenizer
        assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
        assert tokenizer("größe straße", add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids, group_tokens=False) == "größe straße"


@pytest.mark.parametrize("kind", KINDS)
def test_a_replaced_tokenizer_keeps_the_rows_of_shared_pieces(kind, tmp_path):
    model, processor = load_golden(kind)
    before, num_labels = copy_vocabulary_tensors(model), model.config.vocab_size - 1
    old_pieces = processor.tokenizer.convert_ids_to_tokens(range(num_labels))
    path = tmp_path / "german.model"
    path.write_bytes(german_sentencepiece_model())
    replace_tokenizer(model, processor, path)
    pieces = processor.tokenizer.convert_ids_to_tokens(range(model.config.vocab_size - 1))
    assert pieces == build_tokenizer([path.read_bytes()], kind).convert_ids_to_tokens(range(64))
    shared_pieces = [piece for piece in pieces if piece in old_pieces]
    assert 20 < len(shared_pieces) < 64
    first_new_id = next(index for index, piece in enumerate(pieces) if piece not in old_pieces)
    for name, new in copy_vocabulary_tensors(model).items():
        old = before[name]
        assert torch.equal(new[64:], old[num_labels:])
        for piece in shared_pieces:
            assert torch.equal(new[pieces.index(piece)], old[old_pieces.index(piece)]), piece
        assert torch.equal(new[first_new_id], old[:num_labels].mean(0))
    assert int(generate_sequences(model, processor(noise(2.0), sampling_rate=16000)).max()) <= 64
    export_nemo(model, processor, tmp_path / "german.nemo")
    loaded_model, loaded_processor = load_nemo(tmp_path / "german.nemo")
    assert loaded_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in loaded_model.state_dict().items())


def test_the_processor_gets_the_blank_of_the_replaced_tokenizer(tmp_path):
    """The blank of the demo model is its pad token; that of a SentencePiece model is a token of its own."""
    model, processor = load_nemo(demo_model_path())
    assert processor.blank_token == processor.tokenizer.pad_token
    replace_tokenizer(model, processor, german_sentencepiece_model())
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for saved_model, saved_processor in ((model, processor), load_nemo(tmp_path)):
        assert saved_processor.blank_token_id == saved_model.config.blank_token_id == 64
        assert saved_processor.tokenizer.convert_ids_to_tokens(64) == saved_processor.blank_token


def test_an_added_punctuation_mark_is_attached_to_words():
    model, processor = load_golden("tdt")
    assert "¿" not in processor.punctuation
    extend_vocabulary(model, processor, ["¿"])
    assert "¿" in processor.punctuation


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["the", "the"], "got 'the'"),
        (["he"], r"must not be in the vocabulary.*got 'he'"),
        (["▁neu"], "got '▁neu'"),
        ([" neu"], "got ' neu'"),
        ([""], "got ''"),
        (["<blank>"], "got '<blank>'"),
    ],
)
def test_invalid_tokens_are_refused_and_nothing_changes(tokens, message):
    model, processor = load_golden("tdt")
    with pytest.raises(ValueError, match=message):
        extend_vocabulary(model, processor, tokens)
    assert model.config.vocab_size == len(processor.tokenizer) == 129


def test_a_token_that_normalisation_changes_is_refused():
    # the SentencePiece model normalises with nmt_nfkc
    model, processor = load_golden("ctc")
    with pytest.raises(ValueError, match=r"'ﬁ' can never be matched.*NFKC"):
        extend_vocabulary(model, processor, ["ﬁ"])
    assert model.ctc_head.weight.shape[0] == 129


def test_an_aggregate_tokenizer_and_the_processor_of_another_model_are_refused():
    model, processor = load_golden("tdt_agg_tokenizer")
    with pytest.raises(ValueError, match="aggregate tokenizer cannot be extended"):
        extend_vocabulary(model, processor, ["ö1"])
    with pytest.raises(ValueError, match="pass the processor that belongs to the model"):
        extend_vocabulary(model, load_golden("tdt")[1], ["ö1"])


def load_model_with_suppressed_durations():
    """Return a TDT model that suppresses its duration outputs, as checkpoints of stock transformers do."""
    model, processor = load_golden("tdt")
    model.generation_config.suppress_tokens = duration_ids(model)
    return model, processor


def duration_ids(model):
    """Return the ids of the duration outputs, which follow that of the blank."""
    vocab_size = model.config.vocab_size
    return list(range(vocab_size, vocab_size + len(model.config.durations)))


def test_suppressed_durations_keep_their_meaning_when_tokens_are_added(tmp_path):
    model, processor = load_model_with_suppressed_durations()
    extend_vocabulary(model, processor, NEW_TOKENS)
    assert model.generation_config.suppress_tokens == duration_ids(model)
    inputs = processor(noise(2.0), sampling_rate=16000)
    sequences = generate_sequences(model, inputs)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded_model, _ = load_nemo(tmp_path)
    assert loaded_model.generation_config.suppress_tokens == duration_ids(model)
    assert torch.equal(generate_sequences(loaded_model, inputs), sequences)


def test_suppressed_tokens_keep_their_meaning_with_a_replaced_tokenizer():
    model, processor = load_model_with_suppressed_durations()
    num_labels = model.config.vocab_size - 1
    old_pieces = processor.tokenizer.convert_ids_to_tokens(range(num_labels))
    tokenizer = build_tokenizer([german_sentencepiece_model()], "tdt")
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer) - 1))
    moved = next(
        piece for piece in old_pieces[3:] if piece in pieces and pieces.index(piece) != old_pieces.index(piece)
    )
    removed = next(piece for piece in old_pieces if piece not in pieces)
    suppressed = [old_pieces.index(moved), old_pieces.index(removed), *duration_ids(model)]
    model.generation_config.suppress_tokens = suppressed
    model.generation_config.begin_suppress_tokens = [old_pieces.index(removed)]
    replace_tokenizer(model, processor, tokenizer)
    assert model.config.vocab_size != num_labels + 1
    assert model.generation_config.suppress_tokens == [pieces.index(moved), *duration_ids(model)]
    assert model.generation_config.begin_suppress_tokens is None


def test_a_model_with_suppressed_durations_and_added_tokens_can_be_evaluated(tmp_path):
    model, processor = load_model_with_suppressed_durations()
    extend_vocabulary(model, processor, NEW_TOKENS)
    rows = [{"audio": noise(1.0), "text": "the"}]
    settings = training_arguments(tmp_path, 1)
    trainer = ParakeetTrainer(model, settings, eval_dataset=rows, processing_class=processor)
    scores = trainer.evaluate()
    assert scores["eval_loss"] > 0
    assert scores["eval_wer"] >= 1

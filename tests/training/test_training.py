"""Training: what a batch is, what an update does, and that every head learns."""

import copy
import logging
import multiprocessing

import jiwer
import numpy as np
import pytest
import torch
from conftest import noise
from torch.utils.data import DataLoader
from training_helpers import HEADS, arguments, features_of, sentence_rows, small
from transformers import Trainer, TrainerCallback, get_inverse_sqrt_schedule, pipeline

import transformers_parakeet as tp
from transformers_parakeet.training.trainer import (
    DurationBatchSampler,
    ErrorRates,
    NonFiniteGuard,
    ParakeetTrainer,
    SpeechCollator,
    add_lora,
    error_rates,
    freeze,
    generated_tokens,
    normalize_text,
)

ROWS = sentence_rows()


@pytest.fixture
def warnings_of(monkeypatch):
    """Warnings of the module, as texts."""
    texts = []
    for name in ("training.trainer", "training.update_guard"):
        logger = logging.getLogger(f"transformers_parakeet.{name}")
        monkeypatch.setattr(logger, "warning", lambda text, *args, **kwargs: texts.append(text))
    return texts


@pytest.fixture(scope="module")
def ctc():
    """A small CTC model's processor, and the sentences as features."""
    _, processor = small("ctc")
    return processor, features_of(ROWS, processor)


# the batch


def test_a_batch_is_what_the_processor_makes_but_for_the_padding_of_labels(ctc):
    processor, _ = ctc
    rows = [{"audio": noise(1.0), "text": "where is my brother now"}, {"audio": noise(0.6, 1), "text": "go"}]
    batch = SpeechCollator(processor, dither=0.0)(rows)
    whole = processor([row["audio"] for row in rows], text=[row["text"] for row in rows], sampling_rate=16000)
    frames = batch["input_features"].shape[1]
    assert torch.equal(batch["attention_mask"], whole["attention_mask"][:, :frames])
    assert not whole["attention_mask"][:, frames:].any()
    assert torch.allclose(batch["input_features"], whole["input_features"][:, :frames], atol=1e-5)
    padding = batch["labels"] == -100
    assert torch.equal(padding, whole["labels"] == processor.tokenizer.pad_token_id)
    assert torch.equal(batch["labels"][~padding], whole["labels"][~padding])
    assert padding.any()


def test_features_and_labels_can_come_computed(ctc):
    processor, _ = ctc
    collator = SpeechCollator(processor, dither=0.0)
    from_audio = collator(ROWS[:3])
    rows = [
        {"input_features": features[mask].tolist(), "labels": labels.tolist()}
        for features, mask, labels in zip(
            *(from_audio[k] for k in ("input_features", "attention_mask", "labels")), strict=True
        )
    ]
    again = collator(rows)
    assert all(torch.equal(again[name], from_audio[name]) for name in from_audio)
    assert "labels" not in collator([{"audio": noise(1.0)}])


@pytest.mark.parametrize("head", HEADS)
def test_every_padding_of_labels_gives_one_loss_and_nothing_said_has_one(head):
    model, processor = small(head)
    rows = [{"audio": noise(1.5), "text": "what do you mean sir"}, {"audio": noise(1.0, 1), "text": ""}]
    batch = SpeechCollator(processor)(rows)
    model.eval()
    loss = model(**batch).loss
    assert loss.isfinite()
    padded = batch["labels"].masked_fill(batch["labels"] == -100, processor.tokenizer.pad_token_id)
    assert torch.equal(model(**{**batch, "labels": padded}).loss, loss)
    silent = SpeechCollator(processor)([{"audio": noise(1.0), "text": ""}] * 2)
    assert silent["labels"].tolist() == [[-100], [-100]]
    nothing = model(**silent).loss
    nothing.backward()
    assert nothing.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_broken_clip_is_named_or_left_out_and_counted(ctc, tmp_path, warnings_of):
    processor, _ = ctc
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no audio at all " * 50)
    broken = [
        {"audio": str(bad), "text": "a"},
        {"audio": str(tmp_path / "missing.flac"), "text": "b"},
        {"audio": np.full(16000, np.nan, np.float32), "text": "c", "id": "not-finite"},
        {"audio": {"bytes": b"x" * 100, "path": "packed.ogg"}, "text": "d"},
        {"audio": np.zeros(100, np.float32), "text": "e", "id": "too-short"},
    ]
    names = ["bad.wav", "missing.flac", "not-finite", "packed.ogg", "too-short"]
    for row, name in zip(broken, names, strict=True):
        with pytest.raises(tp.AudioError, match=name):
            SpeechCollator(processor)([ROWS[0], row])
    collator = SpeechCollator(processor, skip_broken=True)
    batch = collator([ROWS[0], *broken, ROWS[1]])
    good = SpeechCollator(processor)([ROWS[0], ROWS[1]])
    assert all(torch.equal(batch[name], good[name]) for name in good)
    assert collator.counts.as_dict() == {"broken_clips": 5}
    assert [name in text for name, text in zip(names, warnings_of, strict=True)] == [True] * 5
    alone = collator(broken[:1])
    assert alone["labels"].tolist() == [[-100]]
    assert alone["attention_mask"].sum() == 100
    assert "second of silence" in warnings_of[-1]


def test_counts_are_those_of_all_workers(ctc, tmp_path):
    processor, _ = ctc
    rows = [{"audio": str(tmp_path / f"{index}.wav"), "text": "a"} for index in range(4)]
    collator = SpeechCollator(processor, skip_broken=True)
    context = multiprocessing.get_context("fork")
    loader = DataLoader(rows, batch_size=1, num_workers=2, collate_fn=collator, multiprocessing_context=context)
    assert len(list(loader)) == 4
    assert collator.counts.as_dict() == {"broken_clips": 4}


@pytest.mark.parametrize("head", HEADS)
def test_transcripts_longer_than_the_frames(head, warnings_of):
    model, processor = small(head)
    text = " ".join(row["text"] for row in ROWS)
    collator = SpeechCollator(processor, ctc=True if head == "hybrid" else None)
    batch = collator([{"audio": noise(0.5), "text": text, "id": "hasty"}])
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if head == "ctc":
        assert loss == 0
    # 0.5 s have 50 mel frames, which give 7
    expected = [("hasty" in line, "the clip has 7" in line) for line in warnings_of]
    assert expected == ([(True, True)] if head in ("ctc", "hybrid") else [])
    assert collator.counts.as_dict() == ({"transcripts_too_long": 1} if expected else {})


def test_characters_that_the_vocabulary_lacks_are_told(ctc, warnings_of):
    processor, _ = ctc
    SpeechCollator(processor)([{"audio": noise(1.0), "text": "GO"}])
    assert "characters that the vocabulary lacks" in warnings_of[0]
    assert "'GO'" in warnings_of[0]


def test_dither_is_for_training_only(ctc, tmp_path):
    processor, _ = ctc
    model, _ = small("ctc")
    rows = [{"audio": np.zeros(16000, np.float32), "text": "go"}]
    trainer = ParakeetTrainer(
        model, arguments(tmp_path, 1), train_dataset=rows, eval_dataset=rows, processing_class=processor
    )
    (training,), (evaluation,) = list(trainer.get_train_dataloader()), list(trainer.get_eval_dataloader())
    assert training["input_features"].std() > 0.5
    assert evaluation["input_features"].std() == 0
    assert trainer.data_collator.dither == 1e-5


# batches by duration


def test_batches_by_duration_hold_every_clip_once_within_the_limit():
    durations = np.random.default_rng(0).uniform(0.3, 12, size=301)
    sampler = DurationBatchSampler(durations, 40.0, seed=3)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(index for batch in batches for index in batch) == list(range(301))
        assert max(len(batch) * durations[batch].max() for batch in batches) <= 40.0
        orders.append(batches)
    assert orders[0] != orders[1] != orders[2]
    assert {tuple(sorted(b)) for b in orders[0]} != {tuple(sorted(b)) for b in orders[1]}
    sampler.set_epoch(0)
    assert list(sampler) == orders[0]
    # padding that similar durations leave: less than a step of half a second per clip, plus what a batch spans
    filled = [durations[batch].sum() / (len(batch) * durations[batch].max()) for batch in orders[0]]
    assert np.mean(filled) > 0.85


def test_processes_share_the_batches_and_have_as_many():
    durations = [1.0] * 10 + [30.0]
    whole = DurationBatchSampler(durations, 2.0)
    assert sorted(map(len, whole)) == [1] + [2] * 5
    parts = [list(DurationBatchSampler(durations, 2.0, process_index=rank, num_processes=4)) for rank in range(4)]
    assert [len(part) for part in parts] == [2] * 4
    dealt = [batch for turn in zip(*parts, strict=True) for batch in turn]
    assert dealt[:6] == list(whole)
    assert dealt[6:] == dealt[:2]


# scores


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Hello,  World!", "hello world"),
        ("Don\u2019t stop \u2014 'now'", "don't stop now"),
        ("O\u00b4Neil o`neil", "o'neil o'neil"),
        ("O\u02bcNeil \u2018now\u2019", "o'neil now"),
        ("twenty-one", "twenty one"),
        ("\uff21\uff22\uff23 \ufb01ne", "abc fine"),
        ("\u0928\u092e\u0938\u094d\u0924\u0947\u0964", "\u0928\u092e\u0938\u094d\u0924\u0947"),
        ("\u00bfQu\u00e9?", "qu\u00e9"),
        ("...", ""),
    ],
)
def test_normalisation_of_text(text, normalized):
    assert normalize_text(text) == normalized


def test_error_rates_are_pooled_over_clips():
    rates = error_rates(["One two three", "four", ""], ["one too three.", "four five", ""])
    assert rates["wer"] == pytest.approx(2 / 4)
    # "two" has one wrong character, " five" five more; 13 and 4 characters were said
    assert rates["cer"] == pytest.approx(6 / 17)


@pytest.mark.parametrize(("head", "decoder"), [(head, None) for head in HEADS] + [("hybrid", "ctc")])
def test_metrics_see_the_tokens_that_the_pipeline_writes_down(head, decoder, tmp_path):
    model, processor = small(head)
    options = {"decoder": decoder} if decoder else {}
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return ErrorRates(processor)(prediction)

    trainer = ParakeetTrainer(
        model,
        arguments(tmp_path, 1, per_device_eval_batch_size=3),
        eval_dataset=ROWS[:7],
        processing_class=processor,
        compute_metrics=metrics,
        generate_kwargs=options,
    )
    scores = trainer.evaluate()
    pipe = pipeline("automatic-speech-recognition", model=model, tokenizer=processor.tokenizer,
                    feature_extractor=processor.feature_extractor)  # fmt: skip
    texts = [pipe(row["audio"], generate_kwargs=options)["text"] for row in ROWS[:7]]
    said = [row["text"] for row in ROWS[:7]]
    rates = ErrorRates(processor)
    assert rates.texts(seen[0].label_ids) == said
    assert [t.strip() for t in rates.texts(seen[0].predictions)] == [t.strip() for t in texts]
    assert any(texts)
    assert scores["eval_wer"] == pytest.approx(error_rates(said, texts)["wer"])
    assert np.asarray(seen[0].predictions).ndim == 2


def test_generated_tokens_of_a_frame_sequence():
    config = tp.ParakeetCTCConfig(vocab_size=5, pad_token_id=4)
    frames = torch.tensor([[4, 1, 1, 4, 1, 2], [4, 4, 4, 4, 4, 4]])
    assert generated_tokens(frames, config).tolist() == [[1, 1, 2], [-100] * 3]


# what is trained


def test_frozen_parts_stay_and_so_do_their_statistics(ctc, tmp_path):
    processor, rows = ctc
    model, _ = small("ctc")
    frozen = freeze(model, ["encoder"])
    assert frozen == sum(p.numel() for p in model.encoder.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ParakeetTrainer(model, arguments(tmp_path, 2), train_dataset=rows, processing_class=processor).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"ctc_head.weight", "ctc_head.bias"}
    with pytest.raises(ValueError, match="no 'decoder': the model has encoder, ctc_head"):
        freeze(model, ["decoder"])


def test_noam_is_the_inverse_root_schedule():
    scale, width, warmup = 5.0, 256, 100
    peak = scale * (width * warmup) ** -0.5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = get_inverse_sqrt_schedule(optimizer, num_warmup_steps=warmup)
    for step in range(1, 1000):
        optimizer.step()
        schedule.step()
        noam = scale * width**-0.5 * min(step**-0.5, step * warmup**-1.5)
        assert schedule.get_last_lr()[0] == pytest.approx(noam, rel=1e-9)


class Poison(TrainerCallback):
    """Makes the gradients of some updates NaN."""

    def __init__(self, updates):
        self.updates = updates

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        if state.global_step in self.updates:
            next(model.parameters()).grad[0] = float("nan")


def test_an_update_with_gradients_that_are_not_finite_is_left_out(ctc, tmp_path, warnings_of):
    processor, rows = ctc
    model, _ = small("ctc")
    states = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            states.append({name: value.clone() for name, value in model.named_parameters()})

    trainer = ParakeetTrainer(
        model,
        arguments(tmp_path, 4),
        train_dataset=rows,
        processing_class=processor,
        callbacks=[Poison({1, 2}), Watch()],
    )
    trainer.train()

    def moved(a, b):
        return not all(torch.equal(states[a][name], states[b][name]) for name in states[a])

    assert [moved(0, 1), moved(1, 2), moved(2, 3)] == [False, False, True]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert trainer.guard.skipped == 2
    assert trainer.state.log_history[-1]["skipped_updates"] == 2
    assert "Update 2 is skipped" in warnings_of[0]


def test_gradients_that_are_never_finite_end_the_training(ctc, tmp_path):
    processor, rows = ctc
    model, _ = small("ctc")
    trainer = ParakeetTrainer(
        model, arguments(tmp_path, 60, learning_rate=0.0), train_dataset=rows, processing_class=processor,
        callbacks=[Poison(range(2, 60))],
    )  # fmt: skip
    with pytest.raises(FloatingPointError, match="20 updates in a row"):
        trainer.train()
    assert isinstance(trainer.guard, NonFiniteGuard)


@pytest.mark.parametrize("head", HEADS)
def test_plain_trainer_needs_model_and_processor_only(head, tmp_path):
    model, processor = small(head)
    model.config.spec_augment = {"time_masks": 2, "time_width": 0.05, "freq_masks": 1, "freq_width": 10}

    def collate(rows):
        audio = [tp.load_audio(row["audio"]) for row in rows]
        return dict(processor(audio=audio, text=[row["text"] for row in rows], sampling_rate=16000))

    settings = arguments(tmp_path, 3, remove_unused_columns=False, prediction_loss_only=True)
    trainer = Trainer(model, settings, data_collator=collate, train_dataset=ROWS, eval_dataset=ROWS[:4])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


@pytest.mark.parametrize("head", HEADS)
def test_one_step_as_the_documentation_writes_it(head):
    model, processor = small(head)
    inputs = processor(audio=[tp.load_audio(ROWS[0]["audio"])], text=[ROWS[0]["text"]], sampling_rate=16000)
    model(**inputs).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # keys have no bias that a softmax would see
    assert [name for name in without if "k_proj.bias" not in name] == []


def test_accumulated_batches_are_one_large_batch(ctc, tmp_path):
    """Loss and gradient of 2 x 5 clips are those of 10, for reductions that average over clips."""
    processor, rows = ctc
    curves = []
    for size, accumulation in ((10, 1), (5, 2)):
        model, _ = small("ctc", ctc_loss_reduction="mean_batch")
        freeze(model, ["encoder.layers.0.conv.norm", "encoder.layers.1.conv.norm"])
        settings = arguments(tmp_path, 4, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer = ParakeetTrainer(model, settings, train_dataset=rows, processing_class=processor)
        trainer.train()
        curves.append([(e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e])
    # measured: 3e-6
    assert np.allclose(*curves, rtol=3e-5)
    assert curves[0][-1][0] < curves[0][0][0]


@pytest.mark.parametrize("by_duration", [False, True])
def test_interrupted_and_resumed_is_uninterrupted(by_duration, tmp_path):
    """Bit for bit, with dropout, layer drop, SpecAugment, dither and a shuffled order, in the middle of an epoch."""
    masks = {"time_masks": 2, "time_width": 10, "freq_masks": 1, "freq_width": 10}
    data = datasets_of(ROWS[:9])

    def trainer(folder, **changes):
        model, processor = small("tdt", encoder={"dropout": 0.1, "layerdrop": 0.2}, spec_augment=masks)
        settings = arguments(folder, 6, per_device_train_batch_size=2, save_strategy="steps", save_steps=3, **changes)
        return ParakeetTrainer(model, settings, train_dataset=data, processing_class=processor,
                               batch_duration_s=5.0 if by_duration else None)  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6


def datasets_of(rows):
    import datasets

    return datasets.Dataset.from_list([{key: row[key] for key in ("audio", "text", "duration")} for row in rows])


def test_checkpointing_gives_the_same_gradients(ctc):
    processor, _ = ctc
    batch = SpeechCollator(processor)(ROWS[:3])
    grads = []
    for checkpointing in (False, True):
        model, _ = small("ctc", encoder={"dropout": 0.1, "activation_dropout": 0.1})
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("head", ["ctc", "tdt"])
def test_mixed_precision_follows_full_precision(head, tmp_path):
    curves = []
    for bf16 in (False, True):
        model, processor = small(head)
        rows = features_of(ROWS[:10], processor)
        trainer = ParakeetTrainer(
            model, arguments(tmp_path, 6, bf16=bf16), train_dataset=rows, eval_dataset=rows, processing_class=processor
        )
        trainer.train()
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.evaluate()["eval_loss"] < curves[-1][0]
    # measured: 0.11 %
    assert np.allclose(*curves, rtol=0.005)


# learning


def learn(model, processor, rows, folder, steps, learning_rate=3e-3):
    """Train on few sentences until they are known; return the trainer and its last scores."""
    settings = arguments(
        folder, steps, learning_rate=learning_rate, warmup_steps=20, lr_scheduler_type="cosine", logging_steps=100
    )
    trainer = ParakeetTrainer(model, settings, train_dataset=rows, eval_dataset=rows, processing_class=processor)
    trainer.train()
    return trainer, trainer.evaluate()


@pytest.mark.parametrize(
    ("head", "steps"),
    [
        ("ctc", 240),
        pytest.param("rnnt", 600, marks=pytest.mark.slow),
        pytest.param("tdt", 300, marks=pytest.mark.slow),
        pytest.param("hybrid", 400, marks=pytest.mark.slow),
    ],
)
def test_twenty_sentences_are_learnt_by_heart(head, steps, tmp_path):
    model, processor = small(head, 64)
    trainer, scores = learn(model, processor, features_of(ROWS, processor), tmp_path, steps)
    assert scores["eval_wer"] == 0
    trainer.save_model()
    pipe = pipeline("automatic-speech-recognition", model=str(tmp_path))
    texts = [pipe(row["audio"])["text"] for row in ROWS]
    assert jiwer.wer([row["text"] for row in ROWS], texts) == 0
    if head == "hybrid":
        texts = [pipe(row["audio"], generate_kwargs={"decoder": "ctc"})["text"] for row in ROWS]
        assert jiwer.wer([row["text"] for row in ROWS], texts) < 0.1


@pytest.mark.slow
def test_adapters_learn_other_sentences_by_heart(ctc, tmp_path):
    from peft import PeftModel

    processor, rows = ctc
    model, _ = small("ctc", 64)
    learn(model, processor, rows[:10], tmp_path, 160)
    plain = copy.deepcopy(model)
    adapted = add_lora(model, rank=32)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert all("self_attn" in name and "lora" in name for name in trained)
    _, scores = learn(adapted, processor, rows[10:], tmp_path, 400, learning_rate=5e-3)
    assert scores["eval_wer"] == 0
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    for model in (merged, loaded):
        trainer = ParakeetTrainer(model, arguments(tmp_path, 1), eval_dataset=rows[10:], processing_class=processor)
        assert trainer.evaluate()["eval_wer"] == 0

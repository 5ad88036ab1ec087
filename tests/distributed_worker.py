"""Trains on two processes for `test_distributed.py`: `torchrun distributed_worker.py MODE FOLDER`."""

import json
import os
import sys
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training_helpers import SENTENCES, arguments, features_of, sentence_rows, small
from transformers import TrainerCallback

from transformers_parakeet.training import ParakeetTrainer, SpeechCollator, load_speech

FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["ParakeetEncoderBlock"]}}


class OwnGenerator(TrainerCallback):
    """Lets every process draw other numbers, as data of their own makes them do."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Seed torch's generator with the number of the process."""
        torch.manual_seed(args.process_index)


def train(folder, steps=6, head="hybrid", evaluate=True, encoder=None, callbacks=(), **changes):
    """Return the losses, the gradient norms, the final scores and the trainer of a short run."""
    model, processor = small(head, loss_reduction="mean_batch", ctc_loss_reduction="mean_batch", encoder=encoder)
    rows = features_of(sentence_rows(), processor)
    trainer = ParakeetTrainer(
        model,
        arguments(folder, steps, per_device_train_batch_size=5, per_device_eval_batch_size=3, **changes),
        train_dataset=rows,
        eval_dataset=rows[:7],
        processing_class=processor,
        callbacks=list(callbacks),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": [e["loss"] for e in logs], "norms": [e["grad_norm"] for e in logs]}
    if evaluate:
        result["scores"] = scores_of(trainer)
    return result, trainer


def dropping(folder, **changes):
    """Train with layers that each process drops by its own draws."""
    return train(folder, steps=3, encoder={"layerdrop": 0.5}, callbacks=[OwnGenerator()], **changes)


def sharded_blocks():
    """Return the losses of each process with whole and with sharded blocks, which each drops by its own draws."""
    rank = int(os.environ["RANK"])
    torch.distributed.init_process_group("gloo")
    losses = {}
    for sharded in (False, True):
        model, processor = small("ctc", encoder={"layerdrop": 0.5, "num_hidden_layers": 4})
        batch = SpeechCollator(processor, dither=0.0)(sentence_rows()[:3])
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        torch.manual_seed(rank)
        losses[f"sharded {sharded}"] = [model.train()(**batch).loss.item() for _ in range(4)]
    shared = [None, None]
    torch.distributed.all_gather_object(shared, losses)
    return shared, None


ADAPTED = ["q_proj", "pointwise_conv1", "pointwise_conv2", "linear1", "head", "ctc_head"]


def sharded_adapters():
    """Return loss and gradients of adapters after one step of training, with whole and with sharded weights."""
    torch.distributed.init_process_group("gloo")
    results = {}
    for sharded in (False, True):
        model, processor = small("hybrid", encoder={"layerdrop": 0.0})
        batch = SpeechCollator(processor, dither=0.0)(sentence_rows()[:3])
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=ADAPTED, init_lora_weights=False))
        if sharded:
            mesh = init_device_mesh("cpu", (2,))
            for layer in model.get_base_model().encoder.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert isinstance(next(model.parameters()), DTensor)
        loss = model.train()(**batch).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        results[f"sharded {sharded}"] = {
            "loss": loss.item(),
            "gradients": {
                name: (grad.full_tensor() if sharded else grad).flatten().tolist() for name, grad in gradients.items()
            },
        }
    return results, None


def stream(folder):
    """Train on a stream and evaluate on one; return which clips each process got in training, and the scores."""
    model, processor = small("ctc")
    collator = Recorder(processor)
    trainer = ParakeetTrainer(
        model,
        arguments(folder, 2, per_device_train_batch_size=5, per_device_eval_batch_size=3),
        data_collator=collator,
        train_dataset=load_speech(SENTENCES, streaming=True),
        eval_dataset=load_speech(SENTENCES, streaming=True).take(7),
        processing_class=processor,
    )
    trainer.train()
    clips = collator.clips[: 2 * 5]
    shared = [None, None]
    torch.distributed.all_gather_object(shared, clips)
    return {"clips": shared, "scores": scores_of(trainer)}, trainer


class Recorder(SpeechCollator):
    """A collator that notes the files of its rows."""

    clips: ClassVar[list] = []

    def __call__(self, rows):
        """Note the files and build the batch."""
        self.clips.extend(Path(row["audio"]).name for row in rows)
        return super().__call__(rows)


def broken(folder):
    """Evaluate twelve rows of which the second process cannot read two."""
    rows = sentence_rows()[:12]
    for index in (4, 5):
        rows[index] = {"audio": str(folder / "missing.wav"), "text": "nothing"}
    model, processor = small("ctc")
    trainer = ParakeetTrainer(
        model,
        arguments(folder, 1, per_device_eval_batch_size=3),
        data_collator=SpeechCollator(processor, skip_broken=True),
        eval_dataset=rows,
        processing_class=processor,
    )
    prediction = trainer.predict(rows)
    return {"rows": len(prediction.label_ids), "scores": scores_of(trainer)}, trainer


def scores_of(trainer):
    """Evaluate; return loss and error rates."""
    return {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_wer", "eval_cer")}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    modes = {
        "ddp": lambda: train(folder),
        "ddp_dropping": lambda: dropping(folder, gradient_checkpointing=True),
        "sharded_blocks": sharded_blocks,
        "sharded_adapters": sharded_adapters,
        "fsdp": lambda: train(folder, steps=2, **FSDP),
        "stream": lambda: stream(folder),
        "broken": lambda: broken(folder),
    }
    result, trainer = modes[mode]()
    if trainer is not None:
        trainer.save_model(str(folder / "model"))
    if torch.distributed.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

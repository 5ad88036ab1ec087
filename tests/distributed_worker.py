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
from training_helpers import SENTENCES, compute_features, create_model, sentence_rows, training_arguments
from transformers import TrainerCallback

from transformers_parakeet.training import ParakeetTrainer, SpeechCollator, load_speech

FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["ParakeetEncoderBlock"]}}
# layers with adapters: attention, convolution modules, feed-forward modules, joint network and CTC head
ADAPTED_LAYERS = ["q_proj", "pointwise_conv1", "pointwise_conv2", "linear1", "head", "ctc_head"]


class SeedPerProcess(TrainerCallback):
    """Makes every process draw different random numbers, as processes with different data do."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Seed the generator of torch with the number of the process."""
        torch.manual_seed(args.process_index)


class RecordingCollator(SpeechCollator):
    """A collator that records the file names of its rows."""

    files: ClassVar[list] = []

    def __call__(self, rows):
        """Record the file names and build the batch."""
        self.files.extend(Path(row["audio"]).name for row in rows)
        return super().__call__(rows)


def evaluation_scores(trainer):
    """Evaluate; return the loss and the error rates."""
    names = ("eval_loss", "eval_wer", "eval_cer")
    return {name: value for name, value in trainer.evaluate().items() if name in names}


def train(folder, steps=6, encoder=None, callbacks=(), **argument_changes):
    """Train a hybrid model on the sentences.

    Args:
        folder: output folder.
        steps: number of updates.
        encoder: fields of the encoder configuration that differ.
        callbacks: callbacks of the trainer.
        **argument_changes: `TrainingArguments` that differ.

    Returns:
        A dict with the losses, the gradient norms and the final scores, and the trainer.
    """
    model, processor = create_model(
        "hybrid", loss_reduction="mean_batch", ctc_loss_reduction="mean_batch", encoder=encoder
    )
    rows = compute_features(sentence_rows(), processor)
    trainer = ParakeetTrainer(
        model,
        training_arguments(folder, steps, per_device_eval_batch_size=3, **argument_changes),
        train_dataset=rows,
        eval_dataset=rows[:7],
        processing_class=processor,
        callbacks=list(callbacks),
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "losses": [entry["loss"] for entry in logs],
        "norms": [entry["grad_norm"] for entry in logs],
        "scores": evaluation_scores(trainer),
    }
    return result, trainer


def train_with_dropped_layers(folder):
    """Train with gradient checkpointing and layers that every process drops at random."""
    return train(folder, steps=3, encoder={"layerdrop": 0.5}, callbacks=[SeedPerProcess()], gradient_checkpointing=True)


def shard(model, layers):
    """Shard the weights of layers and of the rest of a model over both processes."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def compare_sharded_layers(folder):
    """Compute losses with dropped layers, with whole and with sharded weights.

    Returns:
        One dict per process, with the losses of four forward passes as `whole` and as `sharded`; and None.
    """
    torch.distributed.init_process_group("gloo")
    losses = {}
    for weights in ("whole", "sharded"):
        model, processor = create_model("ctc", encoder={"layerdrop": 0.5, "num_hidden_layers": 4})
        batch = SpeechCollator(processor, dither=0.0)(sentence_rows()[:3])
        if weights == "sharded":
            shard(model, model.encoder.layers)
        torch.manual_seed(int(os.environ["RANK"]))
        losses[weights] = [model.train()(**batch).loss.item() for _ in range(4)]
    losses_of_processes = [None, None]
    torch.distributed.all_gather_object(losses_of_processes, losses)
    return losses_of_processes, None


def compare_sharded_adapters(folder):
    """Compute loss and gradients of LoRA adapters, with whole and with sharded weights.

    Returns:
        A dict with `whole` and `sharded`: each a dict with the loss and the flattened gradients by name; and None.
    """
    torch.distributed.init_process_group("gloo")
    results = {}
    for weights in ("whole", "sharded"):
        model, processor = create_model("hybrid", encoder={"layerdrop": 0.0})
        batch = SpeechCollator(processor, dither=0.0)(sentence_rows()[:3])
        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=ADAPTED_LAYERS, init_lora_weights=False))
        if weights == "sharded":
            shard(model, model.get_base_model().encoder.layers)
            assert isinstance(next(model.parameters()), DTensor)
        loss = model.train()(**batch).loss
        loss.backward()
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                gradient = parameter.grad.full_tensor() if weights == "sharded" else parameter.grad
                gradients[name] = gradient.flatten().tolist()
        results[weights] = {"loss": loss.item(), "gradients": gradients}
    return results, None


def train_on_stream(folder):
    """Train and evaluate on streams.

    Returns:
        A dict with the files that each process trained on and the scores, and the trainer.
    """
    model, processor = create_model("ctc")
    collator = RecordingCollator(processor)
    trainer = ParakeetTrainer(
        model,
        training_arguments(folder, 2, per_device_train_batch_size=5, per_device_eval_batch_size=3),
        data_collator=collator,
        train_dataset=load_speech(SENTENCES, streaming=True),
        eval_dataset=load_speech(SENTENCES, streaming=True).take(7),
        processing_class=processor,
    )
    trainer.train()
    # the loader reads ahead of the two updates
    files = collator.files[: 2 * 5]
    files_of_processes = [None, None]
    torch.distributed.all_gather_object(files_of_processes, files)
    return {"files": files_of_processes, "scores": evaluation_scores(trainer)}, trainer


def evaluate_with_broken_clips(folder):
    """Evaluate twelve rows, two of which the second process cannot read.

    Returns:
        A dict with the number of evaluated rows and the scores, and the trainer.
    """
    rows = sentence_rows()[:12]
    for index in (4, 5):
        rows[index] = {"audio": str(folder / "missing.wav"), "text": "nothing"}
    model, processor = create_model("ctc")
    trainer = ParakeetTrainer(
        model,
        training_arguments(folder, 1, per_device_eval_batch_size=3),
        data_collator=SpeechCollator(processor, skip_broken=True),
        eval_dataset=rows,
        processing_class=processor,
    )
    prediction = trainer.predict(rows)
    return {"rows": len(prediction.label_ids), "scores": evaluation_scores(trainer)}, trainer


MODES = {
    "ddp": train,
    "dropped_layers": train_with_dropped_layers,
    "sharded_layers": compare_sharded_layers,
    "sharded_adapters": compare_sharded_adapters,
    "fsdp": lambda folder: train(folder, steps=2, **FSDP),
    "stream": train_on_stream,
    "broken_clips": evaluate_with_broken_clips,
}


def main():
    """Run the mode of the command line; write `result.json`, and the model if there is a trainer."""
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    result, trainer = MODES[mode](folder)
    if trainer is not None:
        trainer.save_model(str(folder / "model"))
    if torch.distributed.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()

"""Trains on two processes for `test_distributed.py`: `torchrun distributed_worker.py ddp|fsdp FOLDER`."""

import json
import sys
from pathlib import Path

import torch
from training_helpers import arguments, features_of, sentence_rows, small

from transformers_parakeet.training import ParakeetTrainer

FSDP = {"fsdp": "full_shard auto_wrap", "fsdp_config": {"transformer_layer_cls_to_wrap": ["ParakeetEncoderBlock"]}}


def train(folder, steps=6, head="hybrid", evaluate=True, **changes):
    """Return the losses, the gradient norms, the final scores and the trainer of a short run."""
    model, processor = small(head, loss_reduction="mean_batch", ctc_loss_reduction="mean_batch")
    rows = features_of(sentence_rows(), processor)
    trainer = ParakeetTrainer(
        model,
        arguments(folder, steps, per_device_train_batch_size=5, per_device_eval_batch_size=3, **changes),
        train_dataset=rows,
        eval_dataset=rows[:7],
        processing_class=processor,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {"losses": [e["loss"] for e in logs], "norms": [e["grad_norm"] for e in logs]}
    if evaluate:
        result["scores"] = {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_wer", "eval_cer")}
    return result, trainer


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder = sys.argv[1], Path(sys.argv[2])
    result, trainer = train(folder) if mode == "ddp" else train(folder, steps=2, **FSDP)
    trainer.save_model(str(folder / "model"))
    if trainer.is_world_process_zero():
        (folder / "result.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()

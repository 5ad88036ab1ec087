"""Choose which parameters of a model are trained: freeze modules, or add LoRA adapters.

The training loop itself is `ParakeetTrainer` in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .extras import import_optional

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def freeze(model: Any, names: Sequence[str]) -> int:
    """Exclude modules of a model from training.

    `ParakeetTrainer` also keeps the running statistics of batch norms whose parameters are frozen.

    Args:
        model: a Parakeet model; changed in place.
        names: names of modules, such as `encoder`, `encoder.subsampling` or `encoder.layers.0`.

    Returns:
        The number of frozen parameters.

    Raises:
        ValueError: the model has no module with this name.
    """
    num_frozen = 0
    for name in names:
        parameters = [p for key, p in model.named_parameters() if key == name or key.startswith(f"{name}.")]
        if not parameters:
            module_names = ", ".join(key for key, _ in model.named_children())
            raise ValueError(
                f"`freeze` must name modules of the model, got {name!r}: the model has {module_names} and their "
                "submodules"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
            num_frozen += parameter.numel()
    return num_frozen


def freeze_batch_norm_statistics(model: Any) -> None:
    """Put batch norms without trainable parameters into evaluation mode, so that training data does not update them.

    Args:
        model: any module; call this after `model.train()`, which undoes it.
    """
    for module in model.modules():
        is_batch_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        if is_batch_norm and not any(parameter.requires_grad for parameter in module.parameters()):
            module.eval()


def add_lora(model: Any, rank: int, alpha: int | None = None, targets: Sequence[str] = ATTENTION_PROJECTIONS) -> Any:
    """Freeze a model and add trainable low-rank adapters to its attention projections (LoRA, arXiv 2106.09685).

    Args:
        model: a Parakeet model; changed in place.
        rank: rank of the adapters.
        alpha: the output of an adapter is scaled by `alpha / rank`; None for twice the rank.
        targets: names of the linear layers that get adapters.

    Returns:
        A `PeftModel`; its `merge_and_unload()` returns a plain model with the adapters merged.

    Raises:
        ImportError: the package `peft` is not installed.
    """
    peft = import_optional("peft", "LoRA")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(targets))
    )


__all__ = ["add_lora", "freeze", "freeze_batch_norm_statistics"]

"""Choose which parameters of a model are trained: freeze modules, or add LoRA adapters.

The training loop is in `trainer.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..optional_packages import import_optional

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def freeze(model: Any, names: Sequence[str]) -> int:
    """Freeze modules of a model: exclude their parameters from training.

    `ParakeetTrainer` also leaves the running statistics of frozen batch-norm layers unchanged.

    Args:
        model: a Parakeet model; changed in place.
        names: module names, such as `encoder`, `encoder.subsampling` or `encoder.layers.0`.

    Returns:
        The number of frozen parameters (scalar weights, not tensors).

    Raises:
        ValueError: the model has no module with one of the names.
    """
    num_frozen = 0
    for name in names:
        parameters = [
            parameter
            for parameter_name, parameter in model.named_parameters()
            if parameter_name == name or parameter_name.startswith(f"{name}.")
        ]
        if not parameters:
            module_names = ", ".join(child_name for child_name, _ in model.named_children())
            raise ValueError(
                f"`freeze` must name modules of the model, got {name!r}: use {module_names} or one of their submodules"
            )
        for parameter in parameters:
            parameter.requires_grad_(False)
            num_frozen += parameter.numel()
    return num_frozen


def freeze_batch_norm_statistics(model: Any) -> None:
    """Put batch-norm layers without trainable parameters into eval mode, which freezes their running statistics.

    Args:
        model: any module. Call this function after `model.train()`, which puts all layers back into training mode.
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
        alpha: scaling constant; the output of each adapter is multiplied by `alpha / rank`. None for `2 * rank`.
        targets: names of the linear layers that get adapters.

    Returns:
        A `PeftModel`. Call `merge_and_unload()` to get the Parakeet model back with the adapters merged into its
        weights.

    Raises:
        ImportError: the package `peft` is not installed.
    """
    peft = import_optional("peft", "LoRA", "train")
    return peft.get_peft_model(
        model, peft.LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(targets))
    )


__all__ = ["add_lora", "freeze", "freeze_batch_norm_statistics"]

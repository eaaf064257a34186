"""AdamW's parameter groups and settings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import OptimizerConfig


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to a parameter: to matrices other than the embedding.

    By name, because under ZeRO-3 a parameter has the shape of an empty shard.
    """
    return not (name.endswith(".bias") or "norm." in name or "embed_tokens." in name)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: with weight decay, and without."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decayed if config.decay_norms_and_embeddings or is_decayed(name) else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def adamw_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Return AdamW's arguments apart from the parameters."""
    return {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}


def adamw_kernel(device: torch.device) -> dict[str, Any]:
    """Return the arguments that make torch's AdamW one fused kernel on a GPU, without temporary tensors."""
    return {"fused": True} if device.type == "cuda" else {}


def hyper_parameters(optimizer: Any) -> list[dict[str, Any]]:
    """Return the settings of each parameter group of an optimizer, without its parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def set_hyper_parameters(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """Restore what `hyper_parameters` returned.

    A loaded state carries the settings of the run that wrote it, and DeepSpeed's universal checkpoints copy
    those of the first group to every group. The configuration of the current run must win.
    """
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
    if any(group.get("fused") for group in optimizer.param_groups):
        for parameter, state in optimizer.state.items():  # the fused kernel reads its counter on the device
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)

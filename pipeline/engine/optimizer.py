"""Parameter groups and settings of AdamW and Muon."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.config import OptimizerConfig

MUON_ITERATIONS = 5  # of Newton-Schulz, as in torch.optim.Muon
MUON_ROUND = 2**26  # elements that a rank orthogonalises between two exchanges, or one larger matrix


def is_decayed(name: str) -> bool:
    """Return whether weight decay applies to a parameter: to matrices other than the embedding.

    By name, because under ZeRO-3 a parameter has the shape of an empty shard.
    """
    return not (name.endswith(".bias") or "norm." in name or "embed_tokens." in name)


def is_hidden_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix inside a block, which Muon may update."""
    return is_decayed(name) and not name.startswith("lm_head.")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the parameter groups: Muon's matrices, others with weight decay, and without; none is empty.

    Every group has the same keys. ``lr_ratio`` is its learning rate over that of the step; ``momentum`` is
    Muon's, and None in the groups of AdamW.
    """
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if config.kind == "muon" and is_hidden_matrix(name):
            matrices.append(parameter)
        elif config.decay_norms_and_embeddings or is_decayed(name):
            decayed.append(parameter)
        else:
            others.append(parameter)
    ratio = (config.muon_learning_rate or config.learning_rate) / config.learning_rate
    decay = config.weight_decay
    adamw: dict[str, Any] = {"lr_ratio": 1.0, "momentum": None}
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": decay, "lr_ratio": ratio, "momentum": config.muon_momentum},
        {"params": decayed, "weight_decay": decay, **adamw},
        {"params": others, "weight_decay": 0.0, **adamw},
    ]
    return [group for group in groups if group["params"]]


def is_muon(group: dict[str, Any]) -> bool:
    """Return whether Muon updates a group of `parameter_groups`."""
    return group["momentum"] is not None


def set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    """Set the learning rate of each group of an optimizer from that of the step."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_ratio"]


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

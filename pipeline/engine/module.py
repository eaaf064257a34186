"""The module that an engine trains: initial weights, compiled parts, precision."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from pipeline.base.errors import UserError
from pipeline.config import Config
from pipeline.model.attention import rotate
from pipeline.model.batch import Vocabulary
from pipeline.model.layers import gated
from pipeline.model.masked_head import HeadOptions
from pipeline.model.sequence import WHOLE, WholeSequence
from pipeline.model.transformer import Block, MaskedDiffusionModel


def choose_deterministic_kernels() -> None:
    """Let torch use only kernels that repeat their results bit for bit, in this process.

    Attention's backward and sums by index otherwise add in any order on a GPU. cuBLAS needs a workspace of
    its own for each stream (https://docs.nvidia.com/cuda/cublas/#results-reproducibility), and reads the
    setting when it is first used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor would cost time, and no result may depend on uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def make_model(
    config: Config, vocabulary: Vocabulary, sequence: WholeSequence = WHOLE
) -> MaskedDiffusionModel:
    """Return the model with random weights from the run's seed.

    Args:
        config: the run.
        vocabulary: sizes of the vocabulary.
        sequence: the part of each sequence that this rank computes (sequence parallelism).
    """
    torch.manual_seed(config.train.seed)
    recompute = config.engine.activation_checkpointing
    model = MaskedDiffusionModel(config.model, vocabulary, recompute, sequence)
    model.lm_head.options = HeadOptions(config.engine.fused_head, config.engine.head_row_multiple)
    return model


def compile_parts(config: Config, model: MaskedDiffusionModel, device: torch.device) -> None:
    """Let torch.compile compile blocks (``engine.compile``) or functions (``engine.compile_functions``).

    Both are compiled at their first use, and the names of the weights do not change. All blocks share their
    programs. Each kind of mask, training and evaluation, the first shape and any other take a program of
    their own; beyond torch's limit of 8, they run without compilation.

    Raises:
        UserError: when there is no compiler.
    """
    engine = config.engine
    for setting in ("compile", "compile_functions"):
        if getattr(engine, setting):
            _check_compiler(f"engine.{setting}", device)
    blocks = [block for block in model.model.layers if isinstance(block, Block)]
    if engine.compile_functions:
        rotate_fused, gated_fused = torch.compile(rotate), torch.compile(gated)
        for block in blocks:
            block.self_attn.rotate, block.mlp.gated = rotate_fused, gated_fused
    if engine.compile:
        for block in blocks:  # and not its hooks, in which ZeRO-3 gathers the weights
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]


def _check_compiler(setting: str, device: torch.device) -> None:
    variable, compiler = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    name = os.environ.get(variable, compiler)
    if shutil.which(name) is None:
        raise UserError(
            f"{setting} is true, but there is no {name} on the PATH, which torch.compile needs: install "
            f"it, name another in {variable}, or set {setting} to false."
        )


def precision_of(config: Config, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision of weights and activations in forward and backward; optimizer states are fp32."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if device.type == "cuda" else "fp32"

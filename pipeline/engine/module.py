"""The module that an engine trains: initial weights, compiled blocks, precision."""

from __future__ import annotations

import os
import shutil
from typing import Literal

import torch

from pipeline.base.errors import UserError
from pipeline.config import Config
from pipeline.model.batch import Vocabulary
from pipeline.model.sequence import WHOLE, WholeSequence
from pipeline.model.transformer import MaskedDiffusionModel


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
    return MaskedDiffusionModel(config.model, vocabulary, recompute, sequence)


def compile_blocks(config: Config, model: MaskedDiffusionModel, device: torch.device) -> None:
    """Compile each transformer block at its first use, if ``engine.compile`` is set.

    All blocks share one program, and the names of the weights do not change. Each kind of mask, training and
    evaluation, the first shape and any other take a program of their own; beyond torch's limit of 8, blocks
    run without compilation.

    Raises:
        UserError: when there is no compiler.
    """
    if not config.engine.compile:
        return
    variable, compiler = ("CXX", "g++") if device.type == "cpu" else ("CC", "gcc")
    name = os.environ.get(variable, compiler)
    if shutil.which(name) is None:
        raise UserError(
            f"engine.compile is true, but there is no {name} on the PATH, which torch.compile needs: install "
            f"it, name another in {variable}, or set engine.compile to false."
        )
    for block in model.model.layers:
        block.compile()


def precision_of(config: Config, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision of weights and activations in forward and backward; optimizer states are fp32."""
    if config.engine.precision != "auto":
        return config.engine.precision
    return "bf16" if device.type == "cuda" else "fp32"

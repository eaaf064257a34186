"""Estimate the memory of a rank, part by part, from the settings of a run and of DeepSpeed.

The formulas follow DeepSpeed 0.19.8 and are checked against it on two ranks (benchmarks/plan_memory.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.config import Config
from pipeline.engine.optimizer import MUON_ROUND, is_hidden_matrix
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.planning.activations import body_memory, head_memory
from pipeline.planning.flops import copies

FULL, HALF = 4, 2  # bytes of fp32 and bf16


def width_of(dtype: str | None) -> int:
    """Return the bytes per element of gradients from a key of DeepSpeed's JSON; without the key, of fp32."""
    return FULL if dtype in (None, "fp32") else HALF


@dataclass(frozen=True)
class Parameters:
    """The parameters of a model.

    Attributes:
        shapes: of each parameter, by name.
        rows: rows of the embedding and the output matrix.
        embedding: elements of the embedding.
        tied: whether the embedding is also the output matrix.
    """

    shapes: Mapping[str, Sequence[int]]
    rows: int
    embedding: int
    tied: bool

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """The elements of each parameter, by name."""
        return {name: math.prod(shape) for name, shape in self.shapes.items()}

    @property
    def count(self) -> int:
        """The total number of elements."""
        return sum(self.sizes.values())

    def matrices(self, config: Config) -> list[Sequence[int]]:
        """Return the shape of each matrix that Muon updates in a run; none if AdamW updates all."""
        by_muon = config.optimizer.kind == "muon"
        return [shape for name, shape in self.shapes.items() if by_muon and is_hidden_matrix(name)]

    def muon(self, config: Config) -> list[int]:
        """Return the elements of each of the `matrices`."""
        return [math.prod(shape) for shape in self.matrices(config)]


def count_parameters(config: Config, vocabulary_rows: int) -> Parameters:
    """Return the parameters of the configured model, built on the meta device."""
    with torch.device("meta"):
        model = MaskedDiffusionModel(config.model, Vocabulary(vocabulary_rows, vocabulary_rows, 0))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    embedding = vocabulary_rows * config.model.hidden_size
    return Parameters(shapes, vocabulary_rows, embedding, config.model.tie_embeddings)


@dataclass(frozen=True)
class Zero:
    """The settings of DeepSpeed's zero_optimization section that affect a plan, with DeepSpeed's defaults.

    Attributes:
        stage: 1, 2 or 3; 0 for the plain engine.
        hpz: ranks that share a secondary copy of the weights; 1 = none.
        live: maximum number of elements gathered at once, with prefetching.
        prefetch: elements per prefetch; 0 = no prefetching.
        reuse: a weight used again within this many elements stays gathered.
        persistence: weights of at most this many elements are always gathered.
        bucket: elements of the gradient reduction buffer; 0 = none.
        overlap: whether a second buffer fills while the first is reduced.
        tile: elements that the optimizer updates at once.
        optimizer: location of optimizer states and gradients: gpu, cpu or nvme.
        weights: location of the weight shards.
        quantized_weights: whether weights are communicated as int8 (ZeRO++).
        quantized_gradients: whether gradients are communicated as int4 (ZeRO++).
        accumulation: bytes per element of accumulated gradients.
        reduction: bytes per element of gradients in collectives.
    """

    stage: int
    hpz: int = 1
    live: int = 10**9
    prefetch: int = 5 * 10**7
    reuse: int = 10**9
    persistence: int = 10**5
    bucket: int = 5 * 10**8
    overlap: bool = True
    tile: int = 10**9
    optimizer: str = "gpu"
    weights: str = "gpu"
    quantized_weights: bool = False
    quantized_gradients: bool = False
    accumulation: int = FULL
    reduction: int = FULL

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Zero:
        """Return the settings of a checked DeepSpeed JSON; an empty one means the plain engine."""
        zero = settings.get("zero_optimization")
        if zero is None:
            return cls(0)
        stage = int(zero["stage"])

        def place(section: str) -> str:
            device = (zero.get(section) or {}).get("device", "none")
            return "gpu" if device == "none" else str(device)

        return cls(
            stage,
            max(1, int(zero.get("zero_hpz_partition_size", cls.hpz))),
            int(zero.get("stage3_max_live_parameters", cls.live)),
            int(zero.get("stage3_prefetch_bucket_size", cls.prefetch)),
            int(zero.get("stage3_max_reuse_distance", cls.reuse)),
            int(zero.get("stage3_param_persistence_threshold", cls.persistence)),
            int(zero.get("reduce_bucket_size", cls.bucket)) if zero.get("contiguous_gradients", True) else 0,
            bool(zero.get("overlap_comm", stage == 3)),
            int(zero.get("sub_group_size", cls.tile)),
            place("offload_optimizer"),
            place("offload_param"),
            bool(zero.get("zero_quantized_weights", False)),
            bool(zero.get("zero_quantized_gradients", False)),
            width_of(settings.get("data_types", {}).get("grad_accum_dtype")),
            width_of(settings.get("communication_data_type")),
        )

    def gathered(self, parameters: Parameters) -> int:
        """Return the maximum number of elements gathered at once.

        DeepSpeed prefetches the next bucket at every module, and so fills stage3_max_live_parameters.
        """
        if self.stage < 3:
            return 0
        persistent = sum(size for size in parameters.sizes.values() if size <= self.persistence)
        ahead = self.live if self.prefetch else self.reuse // 2 + max(parameters.sizes.values())
        return min(parameters.count, max(ahead, persistent + max(parameters.sizes.values())))


@dataclass(frozen=True)
class Memory:
    """Peak memory of a rank in bytes.

    Attributes:
        parts: device memory, by part.
        phase: phase of the peak: forward, backward or update.
        host: host memory of this rank's offloaded parts.
        nvme: NVMe space of this rank's offloaded parts.
    """

    parts: dict[str, int]
    phase: str
    host: int = 0
    nvme: int = 0

    @property
    def total(self) -> int:
        """Total bytes on the device."""
        return sum(self.parts.values())


def plan_memory(
    config: Config,
    zero: Zero,
    parameters: Parameters,
    ranks: int,
    masked_rows: int,
    gpu_memory: int | None,
) -> Memory:
    """Return the peak memory of a rank for the configured micro-batch.

    Args:
        config: configuration of the run; its micro-batch must be `fitted`.
        zero: ZeRO settings.
        parameters: parameters of the model.
        ranks: world size.
        masked_rows: masked positions per micro-batch of a sequence-parallel group.
        gpu_memory: bytes of a GPU; None = a CPU. Precision auto is bf16 on a GPU, fp32 on a CPU.
    """
    on_gpu = gpu_memory is not None
    width = {"auto": HALF if on_gpu else FULL, "bf16": HALF, "fp32": FULL}[config.engine.precision]
    if zero.stage == 0:
        width = FULL  # autocast keeps the weights in fp32
    states, host, nvme = _states(config, zero, parameters, ranks, width)
    share = config.engine.sequence_parallel_size
    # The objective may switch.
    inputs = max(copies(config.objective, step) for step in (1, config.train.steps))
    positions = -(-config.data.sequence_length * inputs // share)
    padded = config.data.kind == "pairs" and config.data.padding == "ignored"
    in_blocks = config.objective.block_size is not None  # needs a mask, except for flex_attention on GPUs
    body = body_memory(
        config.model,
        config.engine.activation_checkpointing,
        config.train.micro_batch_size,
        positions,
        width,
        on_gpu,
        masked=not on_gpu if in_blocks else padded,
    )
    rows = -(-masked_rows // share)
    head = head_memory(rows, config.model.hidden_size, parameters.rows, width, gpu_memory)
    live = {"gathered weights": zero.gathered(parameters) * width}
    if zero.hpz > 1:
        live["second copy (hpz)"] = -(-parameters.count // zero.hpz) * width
    # ZeRO-3 fills its buffer in the width of the collective, ZeRO-1 and 2 in that of the weights.
    reduction = min(zero.bucket, parameters.count) * zero.reduction if zero.stage else 0
    later: dict[str, int] = {}
    if zero.stage in (1, 2) and config.train.accumulation(ranks // share) == 1 and "gradients" in states:
        later["gradients"] = states.pop("gradients")  # they appear as the activations are released
    phases = {
        "forward": live | {"activations": body.kept, "head": head.peak},
        "backward": live | {"activations": body.peak, "head": head.kept, "reduction of gradients": reduction},
        "update": later | {"update": _update(config, zero, parameters, ranks, on_gpu)},
    }
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    return Memory(states | phases[phase], phase, host, nvme)


def _states(
    config: Config, zero: Zero, parameters: Parameters, ranks: int, width: int
) -> tuple[dict[str, int], int, int]:
    """Return the memory held all the time: on the device by part, on the host, on NVMe."""
    count, shards = parameters.count, ranks if zero.stage else 1
    part, of_muon = -(-count // shards), sum(parameters.muon(config)) // shards
    accumulation = FULL if width == FULL else zero.accumulation
    sizes = {
        "weights": (part if zero.stage == 3 else count) * width,
        "gradients": (part if zero.stage in (2, 3) else count) * accumulation,
        # AdamW's two states, or Muon's momentum, and the fp32 weights
        "optimizer states": (part * (2 if zero.stage == 0 else 3) - of_muon) * FULL,
        "fp32 gradients": 0 if zero.optimizer == "gpu" else part * FULL,  # for the offloaded optimizer
    }
    if config.optimizer.ema_decay is not None:
        sizes["moving average"] = part * FULL
    places = {
        "weights": zero.weights,
        "gradients": "gpu" if zero.optimizer == "gpu" else "cpu",  # on the host for NVMe, too
        "optimizer states": zero.optimizer,
        "fp32 gradients": zero.optimizer,
        "moving average": zero.optimizer,
    }
    on_gpu = {name: size for name, size in sizes.items() if size and places[name] == "gpu"}
    host = sum(size for name, size in sizes.items() if places[name] == "cpu")
    nvme = sum(size for name, size in sizes.items() if places[name] == "nvme")
    if zero.stage:
        buffers = 2 if zero.stage < 3 and zero.overlap else 1
        width = zero.reduction if zero.stage == 3 else width
        on_gpu["communication buffers"] = buffers * zero.bucket * width
    return on_gpu, host, nvme


def _update(config: Config, zero: Zero, parameters: Parameters, ranks: int, fused: bool) -> int:
    """Return the temporary memory of the optimizer for one tile of elements: AdamW's, or Muon's if larger.

    AdamW has the fp32 gradient and two terms; the fused kernel of GPUs has no terms in memory.
    """
    terms = 0 if fused else 2
    if zero.optimizer != "gpu":
        return 0
    matrices = parameters.muon(config)
    of_muon, others = sum(matrices), parameters.count - sum(matrices)
    if zero.stage == 0:
        whole = max(matrices, default=0)
        return max(terms * others * FULL, whole * FULL + _newton_schulz(config, matrices, whole))
    parts = (-(-count // ranks) for count in (others, of_muon))
    of_adamw, of_muon = (min(part, zero.tile) if zero.stage == 3 else part for part in parts)
    return max(of_adamw * (1 + terms) * FULL, of_muon * FULL + _newton_schulz(config, matrices, of_muon))


def _newton_schulz(config: Config, matrices: Sequence[int], tile: int) -> int:
    """Return the temporary memory of Muon in bf16: the elements of a round, then a matrix and its iteration.

    Args:
        config: the run.
        matrices: elements of each matrix.
        tile: elements of this rank's shard that are updated at once.
    """
    if not matrices:
        return 0
    largest, rows = max(matrices), min(config.model.hidden_size, config.model.intermediate_size)
    together = min(tile, max(MUON_ROUND, largest))
    return HALF * (together + max(together, 4 * largest + 2 * rows**2))

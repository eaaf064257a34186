"""Plan a run on a number of GPUs: memory, time, communication, disk space and cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from pipeline.base.errors import UserError
from pipeline.config import Config
from pipeline.planning.assumptions import UPDATE_BYTES, Assumptions, host_milliseconds
from pipeline.planning.communication import Communication, step_communication
from pipeline.planning.documents import document_pairs
from pipeline.planning.flops import Flops, is_autoregressive, muon_flops, step_flops
from pipeline.planning.gpus import GIB, Gpu
from pipeline.planning.memory import FULL, HALF, Memory, Parameters, Zero, count_parameters, plan_memory

SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class BatchPlan:
    """The steps with one global batch.

    Attributes:
        first_step: of the batch.
        global_batch_size: examples per step.
        accumulation: micro-batches per rank and step.
        seconds: per step, at the first one.
        mfu: model FLOPs utilisation then.
    """

    first_step: int
    global_batch_size: int
    accumulation: int
    seconds: float
    mfu: float


@dataclass(frozen=True)
class RunPlan:
    """The cost of a run on a number of GPUs.

    Attributes:
        gpus: world size.
        micro_batch: examples per forward.
        accumulation: micro-batches per rank and step.
        parameters: number of parameters.
        memory: peak memory per GPU.
        usable: bytes per GPU that the run can use.
        largest_micro_batch: largest divisor of a rank's share of the global batch that fits; 0 = none.
        flops: FLOPs per step.
        communication: bytes communicated per step.
        seconds: seconds per step, by part: computation, communication, update, and the whole step.
        mfu: model FLOPs utilisation.
        days: duration of the run, without evaluations.
        held_out_seconds: duration of all measurements of the held-out loss and bound.
        checkpoint: bytes per checkpoint.
        checkpoint_seconds: seconds to write a checkpoint.
        kept_checkpoints: maximum number of checkpoints on disk at once.
        cost: cost of the run; None without a price.
        batches: the steps with each global batch of a ramp.
    """

    gpus: int
    micro_batch: int
    accumulation: int
    parameters: int
    memory: Memory
    usable: int
    largest_micro_batch: int
    flops: Flops
    communication: Communication
    seconds: dict[str, float]
    mfu: float
    days: float
    held_out_seconds: float
    checkpoint: int
    checkpoint_seconds: float
    kept_checkpoints: int
    cost: float | None
    batches: list[BatchPlan]

    @property
    def fits(self) -> bool:
        """Whether the run fits in the memory of a GPU."""
        return self.memory.total <= self.usable


class Planner:
    """Plans a run for one type of GPU."""

    def __init__(
        self, config: Config, zero: Zero, vocabulary_rows: int, gpu: Gpu, assumptions: Assumptions
    ) -> None:
        """Count the parameters."""
        self.config, self.zero, self.gpu, self.assumed = config, zero, gpu, assumptions
        given, of_engine = assumptions.host_milliseconds, host_milliseconds(zero.stage, config.engine.compile)
        self.host_milliseconds = of_engine if given is None else given
        self.vocabulary_rows = vocabulary_rows
        self.parameters = count_parameters(config, vocabulary_rows)
        self.width = FULL if config.engine.precision == "fp32" else HALF
        self.within = document_pairs(config.data)
        self.usable = int(gpu.memory * (1 - assumptions.fragmentation) - assumptions.reserved_gib * GIB)

    def plan(self, gpus: int, price: float | None = None, largest: bool = False) -> RunPlan:
        """Return the plan for `gpus` GPUs.

        If the objective switches, FLOPs, MFU and seconds are those of the first one, memory is that of the
        larger one, and days cover both. If the batch grows, they are those of the largest, and days cover
        all. The all-to-all of sequence parallelism is not included in the communication.

        Args:
            gpus: world size.
            price: price per GPU hour.
            largest: use the largest micro-batch that fits instead of train.micro_batch_size.

        Raises:
            UserError: if the global batch does not divide evenly among the ranks.
        """
        if self.zero.stage == 0 and gpus > 1:
            raise UserError(
                f"--gpus is {gpus}, but engine.kind is 'plain', which runs in one process: set it to "
                "'deepspeed'."
            )
        config, largest_fitting = self._with_micro_batch(gpus, largest)
        train, batches, total = config.train, [], 0.0
        changes = {config.objective.switch_step or 1, *train.batches}
        for first, end in pairwise([*sorted(changes), train.steps + 1]):
            accumulation, _, flops, seconds = self._step(config, gpus, first, first)
            total += seconds["step"] * (end - first)
            if first in train.batches:
                mfu = self._mfu(flops, seconds, gpus)
                batches.append(BatchPlan(first, train.batch_at(first), accumulation, seconds["step"], mfu))
        accumulation, communication, flops, seconds = self._step(config, gpus, 1, train.steps)
        days = total / SECONDS_A_DAY
        checkpoint = checkpoint_bytes(config, self.zero, self.parameters, self.width)
        nodes = -(-gpus // self.gpu.node_size)
        return RunPlan(
            gpus,
            train.micro_batch_size,
            accumulation,
            self.parameters.count,
            self._memory(config, gpus),
            self.usable,
            largest_fitting,
            flops,
            communication,
            seconds,
            self._mfu(flops, seconds, gpus),
            days,
            self._held_out_seconds(train.micro_batch_size, gpus, accumulation, seconds),
            checkpoint,
            checkpoint / nodes / self.assumed.disk_gigabytes_per_second / 1e9,
            kept_checkpoints(config),
            None if price is None else price * gpus * days * 24,
            batches if train.batch_ramp else [],
        )

    def _step(
        self, config: Config, gpus: int, step: int, batch_of: int
    ) -> tuple[int, Communication, Flops, dict[str, float]]:
        """Return accumulation, communication, FLOPs and seconds of `step` with the batch of `batch_of`."""
        config = replace(config, train=config.train.at(batch_of))
        accumulation = config.train.accumulation(gpus // config.engine.sequence_parallel_size)
        communication = step_communication(self.zero, self.parameters, accumulation, self.width)
        flops = self._flops(config, step)
        return accumulation, communication, flops, self._seconds(gpus, accumulation, flops, communication)

    def _mfu(self, flops: Flops, seconds: dict[str, float], gpus: int) -> float:
        return flops.model / seconds["step"] / gpus / self.gpu.flops

    def _with_micro_batch(self, gpus: int, largest: bool) -> tuple[Config, int]:
        """Return the configuration with the planned micro-batch, and the largest micro-batch that fits."""
        size = self.config.engine.sequence_parallel_size
        if gpus % size:
            raise UserError(
                f"--gpus is {gpus}: it must be a multiple of engine.sequence_parallel_size = {size}."
            )
        wanted = replace(self.config, train=self.config.train.fitted(gpus // size, size))
        share = self.config.train.common_share(gpus // size)
        candidates = [n for n in range(1, share + 1) if share % n == 0]
        fitting = 0
        for number in candidates:
            candidate = replace(wanted, train=replace(wanted.train, micro_batch_size=number))
            if self._memory(candidate, gpus).total > self.usable:
                break
            fitting = number
        if largest and fitting:
            wanted = replace(wanted, train=replace(wanted.train, micro_batch_size=fitting))
        return wanted, fitting

    def _flops(self, config: Config, step: int) -> Flops:
        share = 1.0 if is_autoregressive(config.objective, step) else self.assumed.masked_share
        rows = share * config.train.batch_at(step) * config.data.sequence_length
        return step_flops(config, self.vocabulary_rows, rows, step, within=self.within)

    def _memory(self, config: Config, gpus: int) -> Memory:
        config = replace(config, train=config.train.at(config.train.steps))  # the most micro-batches
        rows = config.train.micro_batch_size * config.data.sequence_length  # all may be masked
        return plan_memory(config, self.zero, self.parameters, gpus, rows, self.gpu.memory)

    def _seconds(
        self, gpus: int, accumulation: int, flops: Flops, communication: Communication
    ) -> dict[str, float]:
        gpu, assumed = self.gpu, self.assumed
        starting = accumulation * self.config.model.layers * self.host_milliseconds / 1e3
        computation = max(starting, flops.executed / gpus / gpu.flops / assumed.efficiency)
        node = min(gpus, gpu.node_size)
        # Between nodes, a ring uses the network cards of all GPUs of a node at once.
        everywhere = gpu.link if gpus <= node else min(gpu.link, node * gpu.network)
        group = gpu.link if self.zero.hpz <= node else everywhere
        share = (gpus - 1) / gpus
        traffic = (communication.all_gather + communication.reduce_scatter) * share / everywhere
        traffic += communication.group_all_gather * (self.zero.hpz - 1) / self.zero.hpz / group
        traffic /= assumed.link_share
        update = self._update_seconds(gpus)
        hidden = assumed.overlap * min(computation, traffic) if self.zero.overlap else 0.0
        return {
            "computation": computation,
            "communication": traffic,
            "update": update,
            "step": computation + traffic - hidden + update,
        }

    def _held_out_seconds(
        self, micro_batch: int, gpus: int, accumulation: int, seconds: dict[str, float]
    ) -> float:
        """Return the seconds of all held-out losses; a forward takes a third of a micro-batch of a step."""
        config, settings = self.config, self.config.evaluation
        if not settings.interval:
            return 0.0
        ranks = gpus // config.engine.sequence_parallel_size
        batches = -(-settings.samples // (ranks * micro_batch))
        sets = sum(map(bool, config.data.added_prefixes))
        forwards = batches * (sets + settings.bound_draws) * (1 if config.optimizer.ema_decay is None else 2)
        times = -(-config.train.steps // settings.interval)
        return times * forwards * (seconds["step"] - seconds["update"]) / accumulation / 3

    def _update_seconds(self, gpus: int) -> float:
        """Return the seconds of an update: what AdamW reads and writes, and the products of Muon."""
        ranks = gpus if self.zero.stage else 1
        elements = self.parameters.count / ranks
        if self.zero.optimizer == "gpu":
            products = muon_flops(self.parameters.matrices(self.config)) / ranks
            moved = elements * UPDATE_BYTES / self.gpu.memory_bandwidth / self.assumed.update_share
            return moved + products / self.gpu.flops / self.assumed.efficiency
        bandwidth = self.assumed.host_gigabytes_per_second * 1e9
        return elements * (28 + 2 * self.width) / bandwidth


def checkpoint_bytes(config: Config, zero: Zero, parameters: Parameters, width: int) -> int:
    """Return the bytes of a checkpoint: fp32 weights, optimizer states, EMA; ZeRO-1 and 2 add the weights."""
    each = 3 * FULL + (FULL if config.optimizer.ema_decay is not None else 0)
    each += width if 0 < zero.stage < 3 else 0
    return parameters.count * each - sum(parameters.muon(config)) * FULL  # no second moment


def kept_checkpoints(config: Config) -> int:
    """Return the maximum number of checkpoints on disk, including the one being written."""
    settings, steps = config.checkpoint, config.train.steps
    forever = steps // settings.keep_every if settings.keep_every else 0
    return min(settings.keep + settings.keep_best + forever, -(-steps // settings.interval)) + 1

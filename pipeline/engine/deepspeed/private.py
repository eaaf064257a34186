"""All uses of DeepSpeed's undocumented names; no other module touches one.

`check_names` looks for all of them when an engine is built. A version of DeepSpeed that lacks one fails at
the start, by that name, and not in the middle of a run.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from typing import Any, Protocol

import deepspeed
import deepspeed.checkpoint.ds_to_universal
import deepspeed.comm
import deepspeed.profiling.flops_profiler.profiler
import deepspeed.runtime.compiler
import deepspeed.runtime.zero.utils
import torch
from deepspeed.checkpoint.constants import PARAM
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.serialization import safe_globals

from pipeline.base.errors import UserError
from pipeline.engine.weights import Piece

# Beside tensors and plain values, the files of ZeRO-1, 2 and 3 hold objects of these classes.
CLASSES_IN_FILES = (LossScaler, ZeroStageEnum, fragment_address)
# torch's own switch: every torch.load is a restricted one, also where DeepSpeed asks for weights_only=False.
RESTRICTED = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
STEP_FILE = "step.pt"  # the step counter of a weight in a universal checkpoint
_FAR = 2**40  # a step that no run gets to
REFUSED = -1.0  # DeepSpeed's sign for a norm that is not finite: it skips the step

MODULE_NAMES = (
    "ops.__compatible_ops__",
    "runtime.compiler.compile",
    "runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS",
    "comm.comm.timers",
    "comm.comm.comms_logger.comms_dict",
    "comm.comm.comms_logger.log_all",
    "profiling.flops_profiler.profiler._matmul_flops_compute",
    "profiling.flops_profiler.profiler._addmm_flops_compute",
    "checkpoint.ds_to_universal._save_checkpoint",
)
ENGINE_NAMES = (
    "checkpoint_engine",
    "_copy_recovery_script",
    "_config.load_universal_checkpoint",
    "optimizer.clip_grad",
    "optimizer.optimizer.state",
)
OPTIMIZER_NAMES = {
    1: (
        "single_partition_of_fp32_groups",
        "bit16_groups",
        "update_lp_params",
        "scaled_global_norm",
        "check_grad_overflow",
        "check_overflow",
    ),
    3: (
        "fp32_partitioned_groups_flat",
        "fp16_groups",
        "_get_param_partition_rank",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
        "_reassign_or_swap_out_partitioned_parameters",
        "_get_norm_groups",
    ),
}
OPTIMIZER_NAMES[2] = OPTIMIZER_NAMES[1]


def check_names(engine: Any, stage: int) -> None:
    """Raise a `UserError` for the first name that this version of DeepSpeed lacks.

    Args:
        engine: what `deepspeed.initialize` returned.
        stage: of ZeRO, 1 to 3.
    """
    wanted = {"": MODULE_NAMES, "engine.": ENGINE_NAMES, "engine.optimizer.": OPTIMIZER_NAMES[stage]}
    owners = {"": deepspeed, "engine.": engine, "engine.optimizer.": engine.optimizer}
    for owner, names in wanted.items():
        for name in names:
            try:
                attrgetter(name)(owners[owner])
            except AttributeError:
                version = f"DeepSpeed {deepspeed.__version__}, at ZeRO stage {stage}"
                remedy = "install the version that requirements.txt names"
                raise UserError(f"{version}, has no {owner}{name}: {remedy}.") from None


def leave_out_op(name: str) -> None:
    """Keep DeepSpeed from compiling one of its kernels."""
    deepspeed.ops.__compatible_ops__[name] = False


def allow_optimizer(kind: type[torch.optim.Optimizer]) -> None:
    """Let ZeRO run an optimizer of this class; it asks for a list of classes, and warns of any other."""
    if kind not in deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS:
        deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS.append(kind)


def forget_powers(optimizer: Any) -> None:
    """Let DeepSpeedCPUAdam take the powers of its betas anew at each step.

    It multiplies them up from step to step. A resumed run begins with the powers of its step, whose last bits
    are others. After any step but the one before, they are taken anew.
    """
    update, number, zero = optimizer.ds_opt_adam.adam_update, optimizer.opt_id, torch.zeros(1)
    betas = optimizer.param_groups[0]["betas"]

    def jump(*arguments: object) -> None:
        update(number, _FAR, 0.0, *betas, 1.0, 0.0, True, zero, zero, zero, zero)

    optimizer.register_step_pre_hook(jump)


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's own Muon, which it looks for in every run, without compiling the functions in it.

    Those load torch's compiler at every rank's start, and this project never calls them.
    """
    before = deepspeed.runtime.compiler.compile
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        deepspeed.runtime.compiler.compile = before


def save_through(engine: Any, writer: TorchCheckpointEngine) -> None:
    """Let `engine.save_checkpoint` hand its states to `writer`, and write nothing itself."""
    engine.checkpoint_engine = writer
    # DeepSpeed copies a recovery script beside its files: one more write that can fail on one rank.
    engine._copy_recovery_script = lambda folder: None


@contextlib.contextmanager
def without_foreign_code() -> Iterator[None]:
    """Let DeepSpeed read files without running the code that they name; it unpickles them unrestricted.

    A file that names more than `CLASSES_IN_FILES` raises an UnpicklingError.
    """
    before = {name: os.environ.get(name) for name in RESTRICTED}
    os.environ.update(RESTRICTED)
    try:
        with safe_globals(list(CLASSES_IN_FILES)):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def adding_second_moments() -> Iterator[None]:
    """Let ds_to_universal convert states that have no second moment, as Muon's; it knows those of Adam alone.

    It then writes zeros in their place, which nobody may use.
    """
    load = torch.load

    def completed(*arguments: Any, **options: Any) -> Any:
        content = load(*arguments, **options)
        optimizer = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        for key in ("base_optimizer_state", "optimizer_state_dict"):  # of ZeRO-1 and 2, of ZeRO-3
            states = (optimizer or {}).get(key) or {}
            for state in states.get("state", {}).values():
                if "exp_avg" in state:
                    state.setdefault("exp_avg_sq", torch.zeros(()).expand_as(state["exp_avg"]))
        return content

    torch.load = completed
    try:
        yield
    finally:
        torch.load = load


@contextlib.contextmanager
def loading_universal(engine: Any) -> Iterator[None]:
    """Let an engine load a universal checkpoint, and plain ones again afterwards."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False
    # All states then share one step counter, which torch's AdamW would advance once per state.
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


@contextlib.contextmanager
def keeping_gradient_clip(engine: Any) -> Iterator[None]:
    """Keep the run's gradient clipping inside the block; ZeRO-1 and 2 load that of the checkpoint."""
    limit = engine.optimizer.clip_grad
    yield
    engine.optimizer.clip_grad = limit


@contextlib.contextmanager
def converting_for_every_stage(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Let ds_to_universal write each state of a weight as ZeRO-1 and 2 read it: in its shape, by a key.

    From files of ZeRO-3 it writes flat tensors, which only ZeRO-3 reads; that reads both.

    Args:
        shapes: of the weights, by name.
    """
    save = deepspeed.checkpoint.ds_to_universal._save_checkpoint

    def shaped(path: str, content: Any) -> None:
        shape = shapes.get(os.path.basename(os.path.dirname(path)))
        if shape is not None and isinstance(content, Tensor) and os.path.basename(path) != STEP_FILE:
            content = {PARAM: content.view(shape)}
        save(path, content)

    deepspeed.checkpoint.ds_to_universal._save_checkpoint = shaped
    try:
        yield
    finally:
        deepspeed.checkpoint.ds_to_universal._save_checkpoint = save


def time_collectives_with(timers: Any) -> None:
    """Let DeepSpeed's communication log measure by `timers`."""
    deepspeed.comm.comm.timers = timers


def log_collectives() -> None:
    """Print DeepSpeed's table of timed collectives."""
    deepspeed.comm.comm.comms_logger.log_all()


def seconds_in_collectives() -> float:
    """Return the seconds of this rank's timed collectives, including the wait for other ranks."""
    of_operations = deepspeed.comm.comm.comms_logger.comms_dict.values()
    # For each operation and size: [calls, latencies in ms, bandwidths, bandwidths]
    return sum(sum(record[1]) for sizes in of_operations for record in sizes.values()) / 1e3


@contextlib.contextmanager
def counting_any_product() -> Iterator[None]:
    """Let DeepSpeed's FLOPs profiler count products that are asked for a dtype of their result.

    Its functions for mm and addmm know no ``out_dtype``, by which the head multiplies on a GPU, and would end
    the run with a TypeError.
    """

    def without_dtype(count: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors, out_dtype=None, **options: count(*tensors, **options)

    product = deepspeed.profiling.flops_profiler.profiler._matmul_flops_compute
    added = deepspeed.profiling.flops_profiler.profiler._addmm_flops_compute
    deepspeed.profiling.flops_profiler.profiler._matmul_flops_compute = without_dtype(product)
    deepspeed.profiling.flops_profiler.profiler._addmm_flops_compute = without_dtype(added)
    try:
        yield
    finally:
        deepspeed.profiling.flops_profiler.profiler._matmul_flops_compute = product
        deepspeed.profiling.flops_profiler.profiler._addmm_flops_compute = added


class Shards(Protocol):
    """The fp32 weights that the optimizer of one rank updates."""

    def weights(self) -> list[Tensor]:
        """Return this rank's flat fp32 tensors, which the optimizer updates in place."""

    def pieces(self, names: Mapping[nn.Parameter, str]) -> list[Piece]:
        """Return the parameter and range behind each slice of `weights`."""

    def publish(self) -> None:
        """Make the forward pass use the current `weights`; every rank calls this."""

    def judge(self, accept: Callable[[Tensor], bool]) -> None:
        """Let `accept` decide about each update by the global gradient norm [].

        A norm that is not finite reaches it as infinite or negative. A refused step changes neither weights
        nor optimizer state.
        """


def find_shards(optimizer: Any, stage: int) -> Shards:
    """Return the shards of DeepSpeed's `optimizer` at a ZeRO stage."""
    return _OptimizerShards(optimizer) if stage < 3 else _ParameterShards(optimizer)


class _OptimizerShards:
    """ZeRO-1 and 2: a rank holds a contiguous part of each flattened parameter group."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def weights(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    def pieces(self, names: Mapping[nn.Parameter, str]) -> list[Piece]:
        found = []
        for number, group in enumerate(self.optimizer.bit16_groups):
            for parameter in group:
                fragment = parameter._hp_mapping
                if fragment is not None:
                    offset, place = fragment.lp_fragment_address.start, fragment.hp_fragment_address
                    name, shape = names[parameter], tuple(parameter.shape)
                    found.append(Piece(name, shape, offset, number, place.start, place.numel))
        return found

    def publish(self) -> None:
        self.optimizer.update_lp_params()

    def judge(self, accept: Callable[[Tensor], bool]) -> None:
        norm_of = self.optimizer.scaled_global_norm

        def judged(**options: Any) -> Tensor:
            norm: Tensor = norm_of(**options)
            return norm if accept(norm) else norm.new_tensor(REFUSED)

        self.optimizer.scaled_global_norm = judged
        # The norm shows non-finite gradients; DeepSpeed's own check before it would skip the step unasked.
        self.optimizer.check_grad_overflow = True
        self.optimizer.check_overflow = lambda **_: None


class _ParameterShards:
    """ZeRO-3: a rank holds an equal part of every parameter, the last one padded."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def weights(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    def pieces(self, names: Mapping[nn.Parameter, str]) -> list[Piece]:
        found = []
        for number, group in enumerate(self.optimizer.fp16_groups):
            start = 0
            for parameter in group:
                part = parameter.partition_numel()
                offset = self.optimizer._get_param_partition_rank(parameter) * part
                count = min(part, max(0, parameter.ds_numel - offset))
                found.append(Piece(names[parameter], tuple(parameter.ds_shape), offset, number, start, count))
                start += part
        return found

    def publish(self) -> None:
        """Copy the fp32 shards over the working ones, as DeepSpeed's own step and load do."""
        self.optimizer.checkpoint_event_prologue()  # releases gathered parameters
        for number in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()  # gathers the small parameters that stay whole

    def judge(self, accept: Callable[[Tensor], bool]) -> None:
        norms_of = self.optimizer._get_norm_groups

        def judged() -> list[Tensor]:
            norms: list[Tensor] = norms_of()
            return norms if accept(combine_grad_norm_groups(norms)) else [norms[0].new_tensor(REFUSED)]

        self.optimizer._get_norm_groups = judged

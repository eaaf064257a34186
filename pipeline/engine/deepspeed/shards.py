"""Where ZeRO keeps the fp32 weights of a rank, and how the forward pass gets them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from deepspeed.runtime.utils import combine_grad_norm_groups
from torch import Tensor, nn

from pipeline.engine.weights import Piece

REFUSED = -1.0  # DeepSpeed's sign for a norm that is not finite: it waits for the norm and skips the step


class Shards(Protocol):
    """The fp32 weights that the optimizer of one rank updates."""

    def weights(self) -> list[Tensor]:
        """Return this rank's flat fp32 tensors, which the optimizer updates in place."""

    def pieces(self, names: Mapping[nn.Parameter, str]) -> list[Piece]:
        """Return what of which parameter is in `weights`."""

    def publish(self) -> None:
        """Make the forward pass use `weights` as they are now; every rank calls this."""

    def judge(self, accept: Callable[[Tensor], bool]) -> None:
        """Let `accept` decide on each update by the global gradient norm [].

        A norm that is not finite reaches it as one that is infinite or negative. A refused step leaves
        weights and optimizer state as they were.
        """


def find_shards(optimizer: Any, stage: int) -> Shards:
    """Return the shards of DeepSpeed's `optimizer` for a ZeRO stage."""
    return _OptimizerShards(optimizer) if stage < 3 else _ParameterShards(optimizer)


class _OptimizerShards:
    """ZeRO 1 and 2: a rank holds a run of each parameter group, which begins and ends anywhere."""

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
        # The norm shows what is not finite; a pass over all gradients before it would keep it from us.
        self.optimizer.check_grad_overflow = True
        self.optimizer.check_overflow = lambda **_: None


class _ParameterShards:
    """ZeRO 3: a rank holds an equal part of every parameter, the last ones padded."""

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
        self.optimizer.checkpoint_event_prologue()  # gives up gathered parameters
        for number in range(len(self.optimizer.fp16_groups)):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(number)
        self.optimizer.checkpoint_event_epilogue()  # gathers the small ones that are always kept whole

    def judge(self, accept: Callable[[Tensor], bool]) -> None:
        norms_of = self.optimizer._get_norm_groups

        def judged() -> list[Tensor]:
            norms: list[Tensor] = norms_of()
            return norms if accept(combine_grad_norm_groups(norms)) else [norms[0].new_tensor(REFUSED)]

        self.optimizer._get_norm_groups = judged

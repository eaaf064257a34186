"""Muon for weights that ZeRO has cut into shards (Jordan et al. 2024; Liu et al. 2025, arXiv 2502.16982).

DeepSpeed's own Muon replaces the gradient by its update before the norm is taken, so clipping and guard see
the update's norm, and ``docs/howto/muon.md`` lists more. This one is an ordinary optimizer: it gets the
clipped gradient of its shard, and gives the update of torch.optim.Muon (``match_rms_adamw``).

Momentum is element-wise, so each rank keeps that of its shard. Newton-Schulz needs whole matrices: each is
sent to one rank, orthogonalised there, and sent back, in bf16, the precision of the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple

import deepspeed.comm
import torch
from torch import Tensor

from pipeline.engine.optimizer import MUON_ITERATIONS, MUON_ROUND, is_muon
from pipeline.engine.weights import Piece

RMS = 0.2  # of AdamW's updates over the learning rate, which Muon's are scaled to
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of torch.optim.Muon, as is the next one
SMALLEST_NORM = 1e-7
PRECISION = torch.bfloat16  # of the iteration, and so of what is sent


class ShardedMuon(torch.optim.AdamW):
    """Muon for the groups with a momentum, AdamW for the others, on ZeRO's flat shards."""

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        """Create the optimizer from `parameter_groups` and AdamW's settings; `assign` must follow."""
        super().__init__(groups, **settings)
        self.rounds: dict[Tensor, list[Round]] = {}

    def assign(
        self, weights: Sequence[Tensor], pieces_of_ranks: Sequence[Sequence[Piece]], rank: int
    ) -> None:
        """Say where the pieces of Muon's matrices are.

        Args:
            weights: this rank's flat fp32 tensors.
            pieces_of_ranks: of Muon's matrices, the pieces in those tensors of every rank.
            rank: this rank.
        """
        for number, weight in enumerate(weights):
            here = [[p for p in pieces if p.tensor == number] for pieces in pieces_of_ranks]
            if any(here):
                self.rounds[weight] = plan_rounds(here, rank)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights by their gradients; DeepSpeed calls this for one shard after the other."""
        groups = self.param_groups
        for group in filter(is_muon, groups):
            for weight in group["params"]:
                self._update(weight, group)
        self.param_groups = [group for group in groups if not is_muon(group)]
        super().step()
        self.param_groups = groups

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Update a shard; its gradient becomes the momentum's look-ahead, so no copy is needed."""
        state, rate = self.state[weight], group["lr"]
        if not state:
            # DeepSpeed's universal checkpoints know states by the names that AdamW has for them.
            device = weight.device if group["fused"] else None
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(weight)
        state["step"] += 1
        assert weight.grad is not None
        state["exp_avg"].lerp_(weight.grad, 1 - group["momentum"])
        ahead = weight.grad.lerp_(state["exp_avg"], group["momentum"])  # Nesterov
        weight.mul_(1 - rate * group["weight_decay"])
        for each in self.rounds[weight]:
            for place, scale, update in each.updates(ahead):
                weight[place].add_(update, alpha=-rate * scale)

    def drop_second_moments(self) -> None:
        """Drop what a universal checkpoint holds for AdamW alone, from the states of Muon's shards."""
        for weight in self.rounds:
            self.state[weight].pop("exp_avg_sq", None)


class Part(NamedTuple):
    """A piece of a matrix in this rank's shard, and the factor of its update."""

    place: slice
    scale: float


class Fragment(NamedTuple):
    """Consecutive elements of a matrix: from `offset` in the matrix, at `place` in what was received."""

    offset: int
    place: slice


@dataclass
class Round:
    """What this rank sends, orthogonalises and gets back at once.

    Attributes:
        sent: elements for each rank.
        received: elements from each rank.
        parts: what it sends, in this order.
        matrices: shape and fragments of each matrix that it orthogonalises.
    """

    sent: list[int]
    received: list[int]
    parts: list[Part] = field(default_factory=list)
    matrices: list[tuple[tuple[int, ...], list[Fragment]]] = field(default_factory=list)

    def updates(self, ahead: Tensor) -> list[tuple[slice, float, Tensor]]:
        """Return place, factor and orthogonalised elements of each part of the shard `ahead` [elements]."""
        shards = [ahead[part.place].to(PRECISION) for part in self.parts]
        lengths = [len(shard) for shard in shards]
        buffer = torch.cat(shards) if shards else ahead.new_empty(0, dtype=PRECISION)
        del shards
        buffer = _exchange(buffer, self.sent, self.received)
        for shape, fragments in self.matrices:
            matrix = torch.cat([buffer[fragment.place] for fragment in fragments]).view(shape)
            whole = orthogonalised(matrix).reshape(-1)
            for offset, place in fragments:
                buffer[place] = whole[offset : offset + place.stop - place.start]
        buffer = _exchange(buffer, self.received, self.sent)
        updates = buffer.split(lengths) if lengths else ()
        return [(*part, update) for part, update in zip(self.parts, updates, strict=True)]


def plan_rounds(pieces_of_ranks: Sequence[Sequence[Piece]], rank: int) -> list[Round]:
    """Decide which rank orthogonalises which matrix and when; return this rank's part, as many on each.

    A matrix goes to one of the ranks with the most of it, of these to the one with the least work.

    Args:
        pieces_of_ranks: the pieces of matrices that each rank holds.
        rank: this rank.
    """
    ranks = range(len(pieces_of_ranks))
    holders: dict[str, dict[int, Piece]] = {}
    for holder, pieces in enumerate(pieces_of_ranks):
        for piece in pieces:
            if piece.length:
                holders.setdefault(piece.name, {})[holder] = piece
    work = [0 for _ in ranks]
    turns: list[list[list[str]]] = [[] for _ in ranks]  # the matrices of a rank, by round
    room = [0 for _ in ranks]
    for name, held in holders.items():
        shape = next(iter(held.values())).shape
        most = max(piece.length for piece in held.values())
        owner = min((r for r, piece in held.items() if 2 * piece.length >= most), key=work.__getitem__)
        work[owner] += math.prod(shape) * min(shape)
        room[owner] -= math.prod(shape)
        if room[owner] < 0:
            turns[owner].append([])
            room[owner] = max(0, MUON_ROUND - math.prod(shape))
        turns[owner][-1].append(name)
    return [_round(names, holders, rank) for names in zip_longest(*turns, fillvalue=[])]


def _round(
    names_of_owners: Sequence[Sequence[str]], holders: dict[str, dict[int, Piece]], rank: int
) -> Round:
    """Return this rank's part in a round in which each owner orthogonalises matrices of some names."""
    count = len(names_of_owners)
    done = Round([0] * count, [0] * count)
    for owner, names in enumerate(names_of_owners):
        for piece in (holders[name][rank] for name in names if rank in holders[name]):
            scale = RMS * math.sqrt(max(piece.shape))
            done.parts.append(Part(slice(piece.start, piece.start + piece.length), scale))
            done.sent[owner] += piece.length
    own = names_of_owners[rank]
    fragments: dict[str, list[Fragment]] = {name: [] for name in own}
    for source in range(count):
        for name in own:
            if source in holders[name]:
                piece, start = holders[name][source], sum(done.received)
                fragments[name].append(Fragment(piece.offset, slice(start, start + piece.length)))
                done.received[source] += piece.length
    for name in own:
        shape = next(iter(holders[name].values())).shape
        done.matrices.append((shape, sorted(fragments[name], key=lambda fragment: fragment.offset)))
    return done


def _exchange(buffer: Tensor, sent: list[int], received: list[int]) -> Tensor:
    """Send consecutive parts of `buffer` to the ranks and return theirs; the lists count elements."""
    if len(sent) == 1:
        return buffer
    answer = buffer.new_empty(sum(received))
    deepspeed.comm.all_to_all_single(answer, buffer, received, sent)
    return answer


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return a matrix [n, m] with its singular values near 1, with the same bits as torch.optim.Muon."""
    a, b, c = COEFFICIENTS
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=SMALLEST_NORM)
    for _ in range(MUON_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if wide is not matrix else x

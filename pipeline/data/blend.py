"""How much each dataset contributes to a blend; its indices, built once, by one rank per node."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.base.files import creating_folder, remove_left_overs, write_json
from pipeline.config import DataConfig
from pipeline.data.facts import DatasetFacts
from pipeline.ranks import Ranks

ORDER_FILE = "data_order.json"
POLL = 5.0  # seconds between two words of a rank that builds


@dataclass(frozen=True)
class Share:
    """What a dataset contributes to an epoch of the blend.

    Attributes:
        prefix: of the dataset.
        tokens: of the whole dataset.
        examples: training examples of the dataset.
        used: training examples in an epoch of the blend.
        too_long: training documents dropped by data.too_long: drop.
    """

    prefix: str
    tokens: int
    examples: int
    used: int
    too_long: int = 0

    @property
    def epochs(self) -> float:
        """How often an example is used in an epoch of the blend, on average."""
        return self.used / self.examples if self.examples else 0.0


def used_examples(
    config: DataConfig, examples: Sequence[int], facts: Mapping[str, DatasetFacts]
) -> list[int] | None:
    """Return how many examples of each dataset are in an epoch; None if it uses each example once.

    Args:
        config: the data of a phase.
        examples: training examples of each dataset.
        facts: of the datasets, by prefix.
    """
    weights = config.weights
    if config.temperature is not None:
        weights = [float(facts[prefix].tokens ** (1 / config.temperature)) for prefix in config.prefixes]
    return None if weights is None else blend_sizes(examples, weights, config.max_epochs)


def estimated_shares(config: DataConfig, facts: Mapping[str, DatasetFacts]) -> list[Share]:
    """Return about what each dataset will contribute, without building examples; the arguments as above."""
    train, valid, test = (float(share) for share in config.split.split(","))
    part, examples = train / (train + valid + test), []
    for prefix in config.prefixes:
        packed = facts[prefix].tokens * part // config.sequence_length
        examples.append(int(facts[prefix].documents * part if config.kind == "pairs" else packed))
    used = used_examples(config, examples, facts) or examples
    return [
        Share(prefix, facts[prefix].tokens, *counts)
        for prefix, *counts in zip(config.prefixes, examples, used, strict=True)
    ]


def blend_sizes(examples: Sequence[int], weights: Sequence[float], caps: Sequence[float] | None) -> list[int]:
    """Return how many examples of each dataset are in an epoch of the blend.

    The epoch is as long as all datasets together, shared by `weights`. A dataset at its cap contributes no
    more, and the others fill the gap in proportion to their weights; if all are at their caps, the epoch is
    shorter.

    Args:
        examples: number of examples of each dataset.
        weights: shares, with any sum.
        caps: maximum epochs of each dataset; None for no limit.
    """
    limits = (
        [float("inf")] * len(examples)
        if caps is None
        else [c * n for c, n in zip(caps, examples, strict=True)]
    )
    given: dict[int, float] = {}
    while True:
        free = [i for i in range(len(examples)) if i not in given]
        scale = (sum(examples) - sum(given.values())) / (sum(weights[i] for i in free) or 1)
        over = [i for i in free if weights[i] * scale > limits[i]]
        if not over:
            given |= {i: weights[i] * scale for i in free}
            return [max(1, int(given[i] + 1e-6)) for i in range(len(examples))]
        given |= {i: limits[i] for i in over}


def build_once(folder: Path, build: Callable[[Path], object], ranks: Ranks) -> None:
    """Build `folder` by `build` if it is missing; every rank calls this.

    The first rank builds. On nodes that cannot see its folder (a local disk), one rank each builds then. The
    folder appears by one rename: a killed build leaves nothing, and nodes may build the same folder at the
    same time on a shared file system. The others wait as long as it takes, beyond the time limit of
    collectives.

    Raises:
        UserError: on every rank, when a build raises one.
    """

    def make() -> None:
        if ranks.is_first:
            remove_left_overs(folder)
        with creating_folder(folder) as writing, as_if_alone():
            build(writing)

    for is_builder in (ranks.is_first, ranks.local_rank == 0):
        while_others_wait(make, is_builder and not folder.exists(), ranks)


def while_others_wait(work: Callable[[], object], mine: bool, ranks: Ranks) -> None:
    """Do `work` on the ranks where it is `mine`; the others wait, beyond the time limit of collectives.

    Raises:
        UserError: on every rank, when the work of one raises it.
    """
    with ThreadPoolExecutor(1, "work") as pool:
        working = pool.submit(work if mine else lambda: None)
        while ranks.any(not wait([working], POLL).done):
            pass  # a rank without work waits for the next word of one that works in `any`
    with ranks.agreeing():
        working.result()


@contextlib.contextmanager
def as_if_alone() -> Iterator[None]:
    """Make megatron-core build or load as in a single process.

    Otherwise it builds on global rank 0 only, with barriers for all ranks: no rank of another node could
    build on its own disk, and none could load alone.
    """
    names = {"is_initialized": lambda: False, "get_rank": lambda group=None: 0}
    before = {name: getattr(torch.distributed, name) for name in names}
    for name, function in names.items():
        setattr(torch.distributed, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch.distributed, name, function)


@dataclass(frozen=True)
class Order:
    """What a phase of the data uses, and in what order.

    Attributes:
        first_step: from which on new examples are drawn from it.
        first_example: number of its first example; those of all phases are numbered one after the other.
        fingerprint: of its examples and their order, see `data_fingerprint`.
        shares: what each dataset contributes to an epoch.
    """

    first_step: int
    first_example: int
    fingerprint: str
    shares: Sequence[Share]

    def to_json(self) -> dict[str, Any]:
        """Return the order as nested dictionaries."""
        datasets = [dataclasses.asdict(share) | {"epochs": share.epochs} for share in self.shares]
        own = {"first_step": self.first_step, "first_example": self.first_example}
        return own | {"fingerprint": self.fingerprint, "datasets": datasets}


def write_order(folder: Path, orders: Sequence[Order]) -> None:
    """Write the order of each phase to RUN/data_order.json."""
    write_json(folder / ORDER_FILE, {"phases": [order.to_json() for order in orders]})


def describe_order(shares: Sequence[Share]) -> str:
    """Return the shares of the blend as readable lines."""
    total = sum(share.used for share in shares)
    lines = [f"an epoch: {total:,} training examples"]
    for share in shares:
        lines.append(
            f"  {share.prefix}: {share.used:,} ({share.used / total:.1%}), {share.epochs:.2f} epochs of "
            f"{share.examples:,} examples, {share.tokens:,} tokens"
        )
        if share.too_long:
            among = f"{share.too_long:,} of {share.examples + share.too_long:,} documents"
            lines.append(f"    dropped, longer than data.sequence_length: {among}")
    return "\n".join(lines)

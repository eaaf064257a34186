"""megatron-core's datasets alone: ``import megatron.core`` would bring its trainer and torch's compiler."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType


@contextlib.contextmanager
def _without_trainer() -> Iterator[None]:
    """Let ``megatron.core`` be an empty package meanwhile, with the one function of `utils` that they need.

    Whoever imports either later gets the real one.
    """
    package = importlib.util.find_spec("megatron")
    if package is None or "megatron.core" in sys.modules:
        yield  # the import below says that it is missing; or it is there already
        return
    core, utils = ModuleType("megatron.core"), ModuleType("megatron.core.utils")
    core.__path__ = [f"{folder}/core" for folder in package.submodule_search_locations or ()]
    sys.modules |= {module.__name__: module for module in (core, utils)}
    try:
        utils.log_single_rank = importlib.import_module(  # type: ignore[attr-defined]
            "megatron.core._rank_utils"
        ).log_single_rank
        yield
    finally:
        for module in (core, utils):
            del sys.modules[module.__name__]


with _without_trainer():
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.megatron_dataset import MegatronDataset
    from megatron.core.datasets.utils import Split

__all__ = [
    "BlendedDataset",
    "BlendedMegatronDatasetBuilder",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "MegatronDataset",
    "Split",
]

"""Examples of random length among those of full length, as in LLaDA's pretraining (arXiv 2502.09992)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.examples import PADDING, Array, ExampleDataset

SHORTEST = 2  # with shifted prediction a single token predicts nothing
_PURPOSE = 0x6C656E67  # keeps these draws apart from others of the same seed


@dataclass(frozen=True)
class RandomLengths:
    """Cuts a share of the examples to n ~ U{2..L} tokens; the rest of the row is padding.

    Which examples, and how long they are, depends on the seed and the index of the example alone.

    Attributes:
        dataset: examples of full length.
        share: of the examples that are cut.
        seed: of the draws.
        pad: token of the padding.
    """

    dataset: ExampleDataset
    share: float
    seed: int
    pad: int

    def __len__(self) -> int:
        return len(self.dataset)

    def length(self, index: int, full: int) -> int:
        """Return the tokens that example `index` of `full` tokens keeps."""
        drawn = np.random.SeedSequence((self.seed, _PURPOSE, index)).generate_state(2, np.uint64)
        chosen, where = (int(value) / 2**64 for value in drawn)
        return SHORTEST + int(where * (full - SHORTEST + 1)) if chosen < self.share else full

    def __getitem__(self, index: int) -> dict[str, Array]:
        """Return an example as `ExampleDataset` does."""
        example = dict(self.dataset[index])
        full = len(example["tokens"])
        length = self.length(index, full)
        if length < full:
            rest = {"tokens": self.pad, "roles": PADDING}
            if "documents" in example:  # of the last document: what padding sees must exist
                rest["documents"] = int(example["documents"][length - 1])
            for name, value in rest.items():
                example[name] = example[name].copy()
                example[name][length:] = value
        return example

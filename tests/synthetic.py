"""Small datasets in memory."""

from __future__ import annotations

import numpy as np

from pipeline.data.batch import ANSWER, PADDING, PROMPT, Array


class Pairs:
    """Prompts of 2 tokens and answers of 1 to `longest`; token 100 + i marks sample i."""

    def __init__(self, size: int, longest: int = 6) -> None:
        self.size = size
        self.longest = longest

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Array]:
        assert 0 <= index < self.size
        random = np.random.default_rng(index)
        length = int(random.integers(1, self.longest + 1))
        roles = np.full(2 + self.longest, PADDING, np.int8)
        roles[:2], roles[2 : 2 + length] = PROMPT, ANSWER
        tokens = random.integers(5, 50, 2 + self.longest)
        tokens[0] = 100 + index
        return {"tokens": tokens, "roles": roles}

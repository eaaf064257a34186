"""Sequences of which some positions are asked for, side by side in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batch import ANSWER, PADDING, PROMPT, Samples
from pipeline.sampling.loading import Loaded


@dataclass(frozen=True)
class MaskedSequence:
    """One sequence.

    Attributes:
        tokens: ids; at positions that are to be filled they mean nothing.
        masked: which positions are to be filled, or scored.
    """

    tokens: list[int]
    masked: list[bool]

    @classmethod
    def behind(cls, prompt: list[int], answer: list[int]) -> MaskedSequence:
        """Return a given prompt and an answer that is asked for."""
        return cls([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def stack(
    loaded: Loaded, sequences: Sequence[MaskedSequence], numbers: Sequence[int]
) -> tuple[Samples, Tensor]:
    """Return sequences as one batch on the model's device, padded at the end, and what is masked [B, L].

    Args:
        loaded: the model.
        sequences: of any lengths.
        numbers: of each sequence, by which its noise differs from the others'.
    """
    # Packed text is answer from its first token on, and is cut into blocks there: so is a given beginning.
    given = ANSWER if loaded.config.data.kind == "packed" else PROMPT
    size = len(sequences), max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.full(size, loaded.tokenizer.pad, dtype=torch.int64)
    roles = torch.full(size, PADDING, dtype=torch.int8)
    masked = torch.zeros(size, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = row, slice(len(sequence.tokens))
        tokens[place], masked[place] = torch.tensor(sequence.tokens), torch.tensor(sequence.masked)
        roles[place] = torch.where(masked[place], ANSWER, given).to(torch.int8)
    device = loaded.model.lm_head.weight.device
    return Samples(tokens, roles, torch.tensor(numbers)).to(device), masked.to(device)

"""Sequences of which some positions are asked for, side by side in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.config import Config
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.data.tokenizer import Tokenizer

_SHOWN = 40  # characters of a prompt in a message


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
) -> tuple[Examples, Tensor]:
    """Return `stack_sequences` for a model, on its device."""
    examples, masked = stack_sequences(sequences, numbers, loaded.config.data.kind, loaded.tokenizer.pad)
    device = loaded.model.lm_head.weight.device
    return examples.to(device), masked.to(device)


def stack_sequences(
    sequences: Sequence[MaskedSequence], numbers: Sequence[int], kind: str, pad: int
) -> tuple[Examples, Tensor]:
    """Return sequences as one batch on the CPU, padded at the end, and what is masked [B, L].

    Args:
        sequences: of any lengths.
        numbers: of each sequence, by which its noise differs from the others'.
        kind: of the data that the model was trained on, packed or pairs.
        pad: the padding token.
    """
    # Packed text is answer from its first token on, and is cut into blocks there: so is a given beginning.
    given = ANSWER if kind == "packed" else PROMPT
    size = len(sequences), max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.full(size, pad, dtype=torch.int64)
    roles = torch.full(size, PADDING, dtype=torch.int8)
    masked = torch.zeros(size, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = row, slice(len(sequence.tokens))
        tokens[place], masked[place] = torch.tensor(sequence.tokens), torch.tensor(sequence.masked)
        roles[place] = torch.where(masked[place], ANSWER, given).to(torch.int8)
    return Examples(tokens, roles, torch.tensor(numbers)), masked


def that_fit(prompts: Sequence[str], length: int | None, tokenizer: Tokenizer, config: Config) -> list[bool]:
    """Return which prompts leave room for an answer; the arguments are those of `behind_prompts`."""
    limit = config.data.sequence_length
    return [len(ids) + (length or 1) <= limit for ids in tokenizer.encode_batch(prompts)]


def behind_prompts(
    prompts: Sequence[str], length: int | None, tokenizer: Tokenizer, config: Config
) -> list[MaskedSequence]:
    """Return a masked answer behind each prompt.

    Args:
        prompts: texts, of any lengths.
        length: tokens of an answer; None for all up to the sequence length that the model is trained on.
        tokenizer: of the model.
        config: of its run.

    Raises:
        UserError: for a prompt that leaves no room, or one without a token where the model needs one.
    """
    limit = config.data.sequence_length
    sequences = []
    for number, array in enumerate(tokenizer.encode_batch(prompts)):
        ids = array.tolist()
        end = len(ids) + length if length else limit
        if end > limit or end <= len(ids):
            which = (
                f"prompt {number + 1} of {len(prompts)}, {prompts[number][:_SHOWN]!r}, of {len(ids)} tokens"
            )
            raise UserError(
                f"{which} with an answer of {length or 'at least 1'} exceeds the sequence length that the "
                f"model was trained on, {limit}: shorten one of them."
            )
        sequences.append(MaskedSequence.behind(ids, [tokenizer.mask] * (end - len(ids))))
    check_beginnings(sequences, config)
    return sequences


def check_beginnings(sequences: Sequence[MaskedSequence], config: Config) -> None:
    """Raise a `UserError` for a sequence that begins with a mask where the model needs a token."""
    if config.model.prediction == "shifted" and any(sequence.masked[0] for sequence in sequences):
        raise UserError(
            "a prompt is empty, or a text begins with a masked span, but with model.prediction = 'shifted' "
            "each token is predicted at the one before it: begin with at least one given token."
        )


def up_to_end(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return an answer up to and with its end-of-sequence token."""
    return tokens[: tokens.index(tokenizer.eos) + 1] if tokenizer.eos in tokens else tokens

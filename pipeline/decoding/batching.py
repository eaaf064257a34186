"""Batch partly masked sequences for decoding and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.config import Config
from pipeline.corpus.encode import WordEncoder
from pipeline.corpus.special_text import SpecialEncoder
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.data.tokenizer import Tokenizer

_SHOWN = 40  # characters of a prompt in a message


@dataclass(frozen=True)
class MaskedSequence:
    """A sequence with masked positions.

    Attributes:
        tokens: ids; to be scored, or ignored where they are to be filled.
        masked: positions to fill or to score.
    """

    tokens: list[int]
    masked: list[bool]

    @classmethod
    def behind(cls, prompt: list[int], answer: list[int]) -> MaskedSequence:
        """Return a sequence of a given prompt and a masked answer."""
        return cls([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))


def stack(
    loaded: Loaded, sequences: Sequence[MaskedSequence], numbers: Sequence[int]
) -> tuple[Examples, Tensor]:
    """Return `stack_sequences` for a loaded model, on its device."""
    kind, device = loaded.config.data.kind, loaded.model.lm_head.weight.device
    return stack_sequences(sequences, numbers, kind, loaded.tokenizer.pad, device)


def stack_sequences(
    sequences: Sequence[MaskedSequence], numbers: Sequence[int], kind: str, pad: int, device: torch.device
) -> tuple[Examples, Tensor]:
    """Return a batch, padded at the end, and its masked positions [B, L] bool.

    Args:
        sequences: sequences of any lengths.
        numbers: the id of each sequence; it seeds the noise.
        kind: kind of the training data, packed or pairs.
        pad: the padding token.
        device: device of the batch.
    """
    # In packed text every token is answer and blocks start at the first one, so given tokens are answer, too.
    given = ANSWER if kind == "packed" else PROMPT
    size = len(sequences), max(len(sequence.tokens) for sequence in sequences)
    tokens = torch.full(size, pad, dtype=torch.int64)
    roles = torch.full(size, PADDING, dtype=torch.int8)
    masked = torch.zeros(size, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        place = row, slice(len(sequence.tokens))
        tokens[place], masked[place] = torch.tensor(sequence.tokens), torch.tensor(sequence.masked)
        roles[place] = torch.where(masked[place], ANSWER, given).to(torch.int8)
    return Examples(tokens, roles, torch.tensor(numbers)).to(device), masked.to(device)


def that_fit(
    prompts: Sequence[str], length: int | None, tokenizer: Tokenizer, config: Config
) -> dict[int, MaskedSequence]:
    """Append a masked answer to each prompt that leaves room for one; return them by index.

    Args:
        prompts: texts of any lengths; in those that a chat template has written, special tokens count.
        length: answer length in tokens; None = up to the trained sequence length.
        tokenizer: tokenizer of the model.
        config: configuration of its run.

    Raises:
        UserError: for an empty prompt if the model needs a first token.
    """
    limit, found = config.data.sequence_length, {}
    encoder = SpecialEncoder(WordEncoder(tokenizer, cut=False))
    for number, ids in enumerate(encoder.encode_batch(prompts)):
        size = length or limit - len(ids)
        if 0 < size <= limit - len(ids):
            found[number] = MaskedSequence.behind(ids.tolist(), [tokenizer.mask] * size)
    check_beginnings(list(found.values()), config)
    return found


def behind_prompts(
    prompts: Sequence[str], length: int | None, tokenizer: Tokenizer, config: Config
) -> list[MaskedSequence]:
    """Append a masked answer to each prompt, as `that_fit`; raise a `UserError` for one that is too long."""
    found, limit = that_fit(prompts, length, tokenizer, config), config.data.sequence_length
    for number, prompt in enumerate(prompts):
        if number not in found:
            which, size = f"prompt {number + 1} of {len(prompts)}", len(tokenizer.encode(str(prompt)))
            raise UserError(
                f"{which}, {prompt[:_SHOWN]!r}, has {size} tokens; with an answer of "
                f"{length or 'at least 1'} it exceeds the trained sequence length {limit}: shorten the "
                "prompt or the answer."
            )
    return list(found.values())


def check_beginnings(sequences: Sequence[MaskedSequence], config: Config) -> None:
    """Raise a `UserError` if a sequence begins with a mask, but the model predicts from the token before."""
    if config.model.prediction == "shifted" and any(sequence.masked[0] for sequence in sequences):
        raise UserError(
            "a prompt is empty, or a text begins with a masked span, but model.prediction = 'shifted' "
            "predicts each token from the one before it: begin with at least one given token."
        )


def up_to_end(tokenizer: Tokenizer, tokens: list[int]) -> list[int]:
    """Return an answer up to and including its first end-of-sequence token."""
    return tokens[: tokens.index(tokenizer.eos) + 1] if tokenizer.eos in tokens else tokens

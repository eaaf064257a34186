"""From prompts to completions, and from texts with masked spans to whole texts, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.data.tokenizer import Tokenizer
from pipeline.decoding.batching import MaskedSequence, behind_prompts, check_beginnings, stack, up_to_end
from pipeline.decoding.decoding import Decoded, decode
from pipeline.decoding.sequences import Sequences
from pipeline.decoding.settings import SamplingSettings


@dataclass(frozen=True)
class Completion:
    """What was filled in for one prompt, or in one text with masked spans.

    Attributes:
        text: of a prompt, its continuation up to the end-of-sequence token; of masked spans, the whole text.
        tokens: ids of the positions that were filled, from left to right, up to and with the
            end-of-sequence token of a continuation.
        order: the step at which each of them was filled; 0 is the first.
        steps: forwards that it took.
    """

    text: str
    tokens: list[int]
    order: list[int]
    steps: int


def complete(
    loaded: Loaded,
    prompts: Sequence[str],
    settings: SamplingSettings | None = None,
    length: int | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
    on_step: Callable[[Sequences], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Return the model's continuation of each prompt.

    Args:
        loaded: the model.
        prompts: texts, of any lengths.
        settings: of the sampler; by default the likeliest tokens in the order of their confidence.
        length: tokens of a continuation; by default up to the sequence length that the model was trained on.
        batch_size: prompts decoded together; it changes nothing but speed and memory.
        on_progress: called with the number of prompts done.
        on_step: called after each step with the sequences that took part in it.
        numbers: of the prompts, part of their noise; by default their places in the list.

    Raises:
        UserError: for a bad setting, a prompt with a continuation beyond the trained sequence length, or one
            without a token where the model needs one.
    """
    tokenizer = loaded.tokenizer
    sequences = behind_prompts(prompts, length, tokenizer, loaded.config)
    found = fill_sequences(
        loaded, sequences, settings, batch_size, tokenizer.eos, on_progress, on_step, numbers
    )
    return [_completion(tokenizer, tokens, order, steps) for _, tokens, order, steps in found]


def infill(
    loaded: Loaded,
    texts: Sequence[Sequence[str | int]],
    settings: SamplingSettings | None = None,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
    on_step: Callable[[Sequences], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Fill masked spans, given the text before and after them.

    Args:
        loaded: the model.
        texts: each a list of given pieces (str) and of masked spans (int, their tokens), such as
            ``["The sky is ", 2, " today."]``.
        settings: see `complete`.
        batch_size: see `complete`.
        on_progress: see `complete`.
        on_step: see `complete`.
        numbers: see `complete`.

    Raises:
        UserError: for a bad setting, a text beyond the trained sequence length or without a masked span, one
            that begins with one where the model needs a token, or a model that does not see what is behind.
    """
    sequences, tokenizer = with_gaps(loaded, texts), loaded.tokenizer
    found = fill_sequences(loaded, sequences, settings, batch_size, None, on_progress, on_step, numbers)
    return [
        Completion(tokenizer.decode(whole), tokens, order, steps) for whole, tokens, order, steps in found
    ]


def with_gaps(loaded: Loaded, texts: Sequence[Sequence[str | int]]) -> list[MaskedSequence]:
    """Return texts with masks in their spans; arguments and errors are those of `infill`."""
    limit, tokenizer = loaded.config.data.sequence_length, loaded.tokenizer
    if loaded.layout.attention != "bidirectional":
        raise UserError(
            "the model was trained in blocks, or from left to right, and does not see what stands behind a "
            "masked span: only a model with objective.block_size = null can fill it in."
        )
    sequences = []
    for pieces in texts:
        tokens: list[int] = []
        masked: list[bool] = []
        for piece in pieces:
            ids = tokenizer.encode(piece).tolist() if isinstance(piece, str) else [tokenizer.mask] * piece
            tokens += ids
            masked += [not isinstance(piece, str)] * len(ids)
        if not any(masked):
            raise UserError(f"{''.join(map(str, pieces))!r} has no masked token: nothing is to be filled in.")
        if len(tokens) > limit:
            raise UserError(
                f"a text of {len(tokens)} tokens exceeds the sequence length that the model was trained on, "
                f"{limit}: shorten it."
            )
        sequences.append(MaskedSequence(tokens, masked))
    check_beginnings(sequences, loaded.config)
    return sequences


class Filled(NamedTuple):
    """A sequence with what was filled in.

    Attributes:
        whole: all of its ids.
        tokens: those that were filled, from left to right.
        order: the step at which each of them was.
        steps: forwards that it took.
    """

    whole: list[int]
    tokens: list[int]
    order: list[int]
    steps: int


def fill_sequences(
    loaded: Loaded,
    sequences: Sequence[MaskedSequence],
    settings: SamplingSettings | None,
    batch_size: int,
    stop: int | None,
    on_progress: Callable[[int], None] = lambda done: None,
    on_step: Callable[[Sequences], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Filled]:
    """Return what decoding makes of each sequence, batch after batch; see `complete` and `decode`."""
    settings = settings or SamplingSettings()
    settings.check()
    numbers = range(len(sequences)) if numbers is None else numbers
    found: list[Filled] = []
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        examples, masked = stack(loaded, part, numbers[start : start + batch_size])
        visibility = loaded.layout.decoding(examples)
        decoded = decode(loaded.model, examples, masked, settings, visibility, stop, on_step)
        found += _rows(decoded, masked)
        on_progress(len(found))
    return found


def _rows(decoded: Decoded, masked: Tensor) -> list[Filled]:
    return [
        Filled(tokens.tolist(), tokens[filled].tolist(), order[filled].tolist(), int(steps))
        for tokens, order, steps, filled in zip(
            decoded.tokens.cpu(), decoded.order.cpu(), decoded.steps.cpu(), masked.cpu(), strict=True
        )
    ]


def _completion(tokenizer: Tokenizer, tokens: list[int], order: list[int], steps: int) -> Completion:
    """Return an answer up to its end-of-sequence token."""
    answer = up_to_end(tokenizer, tokens)
    return Completion(tokenizer.decode(answer), answer, order[: len(answer)], steps)

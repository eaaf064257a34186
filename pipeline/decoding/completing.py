"""Complete prompts and fill masked spans, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.decoding.batching import MaskedSequence, behind_prompts, check_beginnings, stack, up_to_end
from pipeline.decoding.decoding import decode
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import Sequences


@dataclass(frozen=True)
class Completion:
    """The result for one prompt, or for one text with masked spans.

    Attributes:
        text: the continuation of a prompt up to the end-of-sequence token, or the whole text with its spans.
        tokens: ids of the filled positions from left to right; a continuation ends with its end-of-sequence
            token.
        order: the step at which each token was filled, counted from 0.
        steps: forward passes.
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
) -> list[Completion]:
    """Return the model's continuation of each prompt.

    Args:
        loaded: the model.
        prompts: texts of any lengths; their indices seed the noise.
        settings: settings of the sampler; by default greedy decoding in order of confidence.
        length: tokens per continuation; None = up to the trained sequence length.
        batch_size: prompts per batch; it affects only speed and memory.

    Raises:
        UserError: for a bad setting, a prompt that is too long, or an empty one if the model needs a first
            token.
    """
    sequences = behind_prompts(prompts, length, loaded.tokenizer, loaded.config)
    return fill_sequences(loaded, sequences, settings, batch_size, loaded.tokenizer.eos)


def infill(
    loaded: Loaded,
    texts: Sequence[Sequence[str | int]],
    settings: SamplingSettings | None = None,
    batch_size: int = 64,
) -> list[Completion]:
    """Fill masked spans, given the text before and after them.

    Args:
        loaded: the model.
        texts: lists of given pieces (str) and masked spans (int, length in tokens), such as
            ``["The sky is ", 2, " today."]``.
        settings: see `complete`.
        batch_size: see `complete`.

    Raises:
        UserError: for a bad setting, a text that is too long or has no masked span, a text that begins with a
            span if the model needs a first token, or a model that is not bidirectional.
    """
    return fill_sequences(loaded, with_gaps(loaded, texts), settings, batch_size)


def with_gaps(loaded: Loaded, texts: Sequence[Sequence[str | int]]) -> list[MaskedSequence]:
    """Tokenize texts with masked spans; see `infill` for arguments and errors."""
    limit, tokenizer = loaded.config.data.sequence_length, loaded.tokenizer
    if loaded.layout.attention != "bidirectional":
        raise UserError(
            "the model was trained in blocks or from left to right and does not see the text after a masked "
            "span: use a model trained with objective.block_size = null."
        )
    sequences = []
    for pieces in texts:
        tokens: list[int] = []
        masked: list[bool] = []
        for piece in pieces:
            if isinstance(piece, str) and tokenizer.model.lost(piece, tokenizer.unk):
                raise UserError(
                    f"{piece!r} has characters that the tokenizer does not know: they would come "
                    "back as others. Replace them."
                )
            ids = tokenizer.encode(piece).tolist() if isinstance(piece, str) else [tokenizer.mask] * piece
            tokens += ids
            masked += [not isinstance(piece, str)] * len(ids)
        if not any(masked):
            raise UserError(f"{''.join(map(str, pieces))!r} has no masked span: add one.")
        if len(tokens) > limit:
            raise UserError(
                f"a text of {len(tokens)} tokens exceeds the trained sequence length {limit}: shorten it."
            )
        sequences.append(MaskedSequence(tokens, masked))
    check_beginnings(sequences, loaded.config)
    return sequences


def fill_sequences(
    loaded: Loaded,
    sequences: Sequence[MaskedSequence],
    settings: SamplingSettings | None,
    batch_size: int,
    stop: int | None = None,
    on_step: Callable[[Sequences], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[Completion]:
    """Fill the masked positions of sequences, in batches.

    Args:
        loaded: the model.
        sequences: sequences of any lengths.
        settings: see `complete`.
        batch_size: see `complete`.
        stop: the end-of-sequence token; each sequence is then a prompt with an answer behind it, which ends
            there. None = texts with masked spans.
        on_step: called after each step with the sequences in the batch.
        numbers: ids of the sequences, which seed the noise; by default their indices.

    Raises:
        UserError: for a bad setting.
    """
    settings = settings or SamplingSettings()
    settings.check()
    numbers = range(len(sequences)) if numbers is None else numbers
    found: list[Completion] = []
    for start in range(0, len(sequences), batch_size):
        part = sequences[start : start + batch_size]
        examples, masked = stack(loaded, part, numbers[start : start + batch_size])
        visibility = loaded.layout.decoding(examples)
        decoded = decode(loaded.model, examples, masked, settings, visibility, stop, on_step)
        columns = (decoded.tokens.cpu(), decoded.order.cpu(), masked.cpu(), decoded.steps.tolist())
        for whole, order, filled, steps in zip(*columns, strict=True):
            tokens = whole[filled].tolist()
            if stop is not None:
                tokens = up_to_end(loaded.tokenizer, tokens)
            text = loaded.tokenizer.decode(whole.tolist() if stop is None else tokens)
            found.append(Completion(text, tokens, order[filled].tolist()[: len(tokens)], steps))
    return found

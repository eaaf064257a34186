"""Samples of prompts: continuations, and texts with their masked spans filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.checkpoint.load_model import Loaded
from pipeline.decoding.batching import behind_prompts
from pipeline.decoding.cells import Show
from pipeline.decoding.completing import Completion, fill_sequences, with_gaps
from pipeline.decoding.frames import show_step
from pipeline.decoding.prompts import spans
from pipeline.decoding.sampling import SamplingSettings


@dataclass(frozen=True)
class Sample:
    """One sample of a prompt.

    Attributes:
        prompt: the prompt as given.
        number: index among the samples of this prompt.
        text: the prompt with its continuation, or with its masked spans filled.
        completion: tokens, order and steps.
    """

    prompt: str
    number: int
    text: str
    completion: Completion


def generate(
    loaded: Loaded,
    prompts: Sequence[str],
    settings: SamplingSettings,
    samples: int = 1,
    length: int | None = None,
    batch_size: int = 16,
    shows: Sequence[Show] = (),
    as_asked: Callable[[str], str] = str,
) -> Iterator[Sample]:
    """Yield `samples` continuations of each prompt, or fillings of its masked spans, in order.

    All prompts are checked before decoding starts. Samples are yielded batch by batch.

    Args:
        loaded: the model.
        prompts: texts; those with masked spans (`spans`) are filled, the others are continued.
        settings: settings of the sampler.
        samples: samples per prompt, with different noise.
        length: see `complete`.
        batch_size: sequences per batch.
        shows: receive the frames of each step.
        as_asked: what the model is given for a text that is continued, such as a chat.

    Raises:
        UserError: see `complete`, `infill` and `spans`.
    """
    tokenizer = loaded.tokenizer
    texts = dict(enumerate(map(spans, prompts)))
    marked = {i: pieces for i, pieces in texts.items() if any(isinstance(piece, int) for piece in pieces)}
    plain = {i: as_asked("".join(map(str, pieces))) for i, pieces in texts.items() if i not in marked}
    answers = behind_prompts(list(plain.values()), length, tokenizer, loaded.config)
    gaps = with_gaps(loaded, list(marked.values())) if marked else []
    sequences = dict(zip([*plain, *marked], answers + gaps, strict=True))
    total = len(prompts) * samples
    for start in range(0, total, batch_size):
        numbers = range(start, min(start + batch_size, total))
        found: dict[int, Completion] = {}
        for which, stop in ((plain, tokenizer.eos), (marked, None)):
            chosen = [i for i in numbers if i // samples in which]
            given = [sequences[i // samples] for i in chosen]
            on_step = partial(show_step, tokenizer, stop, shows) if shows else None
            done = fill_sequences(loaded, given, settings, batch_size, stop, on_step, chosen)
            found |= zip(chosen, done, strict=True)
        for i in numbers:
            prompt, one = prompts[i // samples], found[i]
            text = one.text if i // samples in marked else f"{plain[i // samples]}{one.text}"
            yield Sample(prompt, i % samples, text, one)

"""Prompts as people write them: lines, records, and texts with masked spans."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.records import Keys, read_all
from pipeline.sampling.completing import Completion, complete, infill
from pipeline.sampling.frames import Watch
from pipeline.sampling.loading import Loaded
from pipeline.sampling.settings import SamplingSettings

_SPAN = re.compile(r"\[MASK\*(.*?)\]")
SPAN_HELP = "[MASK*N] in a text stands for N tokens to be filled in, given what is before and behind"


def read_prompts(path: Path, key: str) -> list[str]:
    """Return the lines of a text file, or the value of `key` in each record of jsonl or parquet.

    Raises:
        UserError: for a file without prompts, of another kind, or with a record that lacks the key.
    """
    text = path.suffix == ".txt" or path.with_suffix("").suffix == ".txt"  # .txt, .txt.gz
    keys = Keys((key,), split="line" if text else None)
    prompts = [record.texts[0] for record in read_all([path], keys)]
    if not prompts:
        raise UserError(f"{path} holds no prompt: give one on each line.")
    return prompts


def spans(text: str) -> list[str | int]:
    """Return the pieces of a text: what is given (str), and the tokens of each masked span (int).

    Raises:
        UserError: for a mark without a number above 0.
    """
    pieces: list[str | int] = []
    for number, piece in enumerate(_SPAN.split(text)):
        if number % 2 == 0:
            pieces += [piece] if piece else []
        elif piece.isdecimal() and int(piece) > 0:
            pieces.append(int(piece))
        else:
            raise UserError(f"[MASK*{piece}] in {text!r}: give the number of tokens, such as [MASK*12].")
    return pieces


@dataclass(frozen=True)
class Sample:
    """What was made of a prompt.

    Attributes:
        prompt: as it was given.
        number: of this sample among those of the prompt.
        text: the prompt with its continuation, or with its masked spans filled in.
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
    on_progress: Callable[[int], None] = lambda done: None,
    watch: Watch = lambda which, stop: None,
) -> list[Sample]:
    """Return `samples` continuations of each prompt, or fillings of its masked spans, in order.

    Args:
        loaded: the model.
        prompts: texts; those with a mark (`spans`) are filled in, the others are continued.
        settings: of the sampler.
        samples: how many of each prompt; they differ by their noise.
        length: see `complete`.
        batch_size: see `complete`.
        on_progress: called with the number of samples done.
        watch: called before each of the two kinds is decoded, with the places of its sequences among all
            samples and the token at which they end; what it returns is called after each step.

    Raises:
        UserError: see `complete`, `infill` and `spans`.
    """
    texts = [spans(prompt) for prompt in prompts for _ in range(samples)]
    marked = [i for i, pieces in enumerate(texts) if any(isinstance(piece, int) for piece in pieces)]
    plain = [i for i in range(len(texts)) if i not in set(marked)]
    found: dict[int, tuple[str, Completion]] = {}
    if plain:
        on_step = watch(plain, loaded.tokenizer.eos)
        given = [prompts[i // samples] for i in plain]
        done = complete(loaded, given, settings, length, batch_size, on_progress, on_step)
        found |= {i: (f"{g}{each.text}", each) for i, g, each in zip(plain, given, done, strict=True)}
    if marked:
        first, on_step = len(plain), watch(marked, None)
        pieces = [texts[i] for i in marked]
        done = infill(loaded, pieces, settings, batch_size, lambda n: on_progress(first + n), on_step)
        found |= {i: (each.text, each) for i, each in zip(marked, done, strict=True)}
    return [Sample(prompts[i // samples], i % samples, *found[i]) for i in range(len(texts))]

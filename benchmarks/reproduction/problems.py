"""Word problems of several steps, each with a Python program that solves it, as in TinyGSM.

A problem begins with a number of things and then changes it two to five times. Which changes, in which order,
is its composition. Compositions are split: a held-out problem is of a kind that was never trained on.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from itertools import product

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Kim", "Lena")
THINGS = ("apples", "books", "coins", "eggs", "marbles", "pens", "shells", "stamps", "stickers", "toys")
CHANGES = {  # lines of the program, and sentences
    "gain": ("x += {n}", "{name} buys {n} more.", "{name} finds {n} more {things}.", "{n} more are added."),
    "lose": (
        "x -= {n}",
        "{name} gives away {n}.",
        "{n} of the {things} are lost.",
        "{name} sells {n} of them.",
    ),
    "times": (
        "x *= {n}",
        "The number of {things} grows to {n} times as many.",
        "Soon there are {n} times as many.",
    ),
    "parts": (
        "x //= {n}",
        "{name} keeps one of {n} equal parts.",
        "{n} friends, {name} too, share them equally.",
    ),
    "other": (
        "x += {n}",
        "{other} has {n} and puts them with these.",
        "{other} brings {n} {things} as well.",
    ),
}
CHANGES_OF_A_PROBLEM = range(2, 6)
LARGEST = 200  # number in a problem
HELD_OUT = 10  # percent of the compositions

Composition = tuple[str, ...]


def compositions(held_out: bool) -> list[Composition]:
    """Return the sequences of changes of one side of the split, by their hash."""
    every = [kinds for count in CHANGES_OF_A_PROBLEM for kinds in product(CHANGES, repeat=count)]
    buckets = [hashlib.sha256(" ".join(kinds).encode()).digest()[0] * 100 // 256 for kinds in every]
    return [kinds for kinds, bucket in zip(every, buckets, strict=True) if (bucket < HELD_OUT) == held_out]


def problems(seed: int, held_out: bool) -> Iterator[tuple[str, str, int]]:
    """Yield questions, programs and results without end, the same for the same arguments.

    Lengths are equally likely, and the compositions of each length.
    """
    rng, known = random.Random(seed), compositions(held_out)
    lengths = [[kinds for kinds in known if len(kinds) == count] for count in CHANGES_OF_A_PROBLEM]
    while True:
        made = _problem(rng, rng.choice(rng.choice([kinds for kinds in lengths if kinds])))
        if made is not None:
            yield made


def _problem(rng: random.Random, kinds: Composition) -> tuple[str, str, int] | None:
    """Return a problem; None where a number becomes too large, or a division leaves a rest."""
    name, other = rng.sample(NAMES, 2)
    things, value = rng.choice(THINGS), rng.randint(2, 40)
    sentences, lines = [f"{name} has {value} {things}."], [f"x = {value}"]
    for kind in kinds:
        n = rng.randint(2, 4) if kind in ("times", "parts") else rng.randint(1, 20)
        line, *wordings = CHANGES[kind]
        after = {"lose": value - n, "times": value * n, "parts": value // n}.get(kind, value + n)
        if not 0 < after <= LARGEST or (kind == "parts" and value % n):
            return None
        value = after
        sentences.append(rng.choice(wordings).format(name=name, other=other, things=things, n=n))
        lines.append(line.format(n=n))
    sentences.append(f"How many {things} does {name} have?")
    body = "".join(f"    {line}\n" for line in [*lines, "return x"])
    return " ".join(sentences), f"def simple_math_problem():\n{body}", value

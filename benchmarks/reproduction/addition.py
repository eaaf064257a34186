"""Addition: common sums, and rare ones whose carries run far."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.comparison import BATCH_SIZE, HELD_OUT, Comparison, Scores, Texts
from benchmarks.reproduction.arms import arms
from benchmarks.reproduction.sums import chain_of, draw_sums
from pipeline.checkpoint.load_model import Loaded
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings

STAGES = 6
KINDS = {"easy": range(3), "hard": range(4, 100)}  # lengths of the longest carry chain
TOKENS_PER_STEP = (1, 2)


def score(loaded: Loaded, pairs: Sequence[Texts], last: bool) -> Scores:
    """Return the share of right sums among the easy and the hard ones by each decoding, and the bound.

    The bound is that of the easy sums.
    """
    figures = {}
    digits = len(pairs[0][1])
    kinds = {
        kind: [pair for pair in pairs if chain_of(pair[0]) in lengths] for kind, lengths in KINDS.items()
    }
    for tokens in TOKENS_PER_STEP:
        for kind, part in kinds.items():
            settings = SamplingSettings(tokens_per_step=tokens)
            answers = complete(loaded, [sums for sums, _ in part], settings, digits, BATCH_SIZE)
            right = [answer.text == truth for answer, (_, truth) in zip(answers, part, strict=True)]
            figures[f"{kind}_{tokens}"] = sum(right) / len(right)
    encode = loaded.tokenizer.encode
    easy = [(encode(sums).tolist(), encode(truth).tolist()) for sums, truth in kinds["easy"]]
    return figures | comparison.bound(loaded, easy)


def prepare(digits: int, folder: Path, options: Namespace) -> list[str]:
    """Make sums to train on, uniform, and to score, easy and hard in turn."""
    train = folder / "train.jsonl"
    if not train.exists():
        held_out = [draw_sums(2, options.items // 2, digits, lengths) for lengths in KINDS.values()]
        trainings.write_records(folder / HELD_OUT, chain.from_iterable(zip(*held_out, strict=True)))
        trainings.write_records(train, draw_sums(1, options.count, digits))
    return trainings.pairs_settings(folder, train, 3 * digits + 3)


def sums_of(digits: int) -> Comparison:
    """Return the comparison on sums of two numbers with this many digits."""
    return Comparison(
        variants=arms(STAGES),
        score=score,
        columns=tuple(f"{kind}_{tokens}" for tokens in TOKENS_PER_STEP for kind in KINDS),
        prepare=partial(prepare, digits),
        config="addition",
        steps=2000,
        interval=100,
        count=150_000,
        items=2000,
        curve_items=400,
    )


ADDITION_5, ADDITION_6 = sums_of(5), sums_of(6)

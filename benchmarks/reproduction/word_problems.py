"""TinyGSM in small: templated word problems, answered by Python programs that a sandbox runs."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

from benchmarks import comparison, trainings
from benchmarks.comparison import BATCH_SIZE, HELD_OUT, Comparison, Scores, Texts
from benchmarks.reproduction.arms import arms
from benchmarks.reproduction.problems import problems
from pipeline.checkpoint.load_model import Loaded
from pipeline.decoding.completing import complete
from pipeline.decoding.sampling import SamplingSettings
from pipeline.evaluation.pairs import as_trained
from pipeline.evaluation.sandbox import Sandbox

STAGES = 12
RECORD = ("question", "code")  # TinyGSM's keys
DECODINGS = {
    "right_2": SamplingSettings(tokens_per_step=2),
    "right_1": SamplingSettings(tokens_per_step=1),
}


def score(loaded: Loaded, pairs: Sequence[Texts], last: bool) -> Scores:
    """Return the share of programs with the right result, and the bound.

    All decodings are used for the `last` checkpoint, the first alone for the others.
    """
    figures = {}
    with closing(Sandbox()) as sandbox:
        truth = [sandbox.run(program).value for _, program in pairs]
        for name in list(DECODINGS) if last else list(DECODINGS)[:1]:
            answers = complete(loaded, [question for question, _ in pairs], DECODINGS[name], None, BATCH_SIZE)
            values = [sandbox.run(answer.text).value for answer in answers]
            figures[name] = sum(a == b for a, b in zip(values, truth, strict=True)) / len(pairs)
    encoded = ([loaded.tokenizer.encode(text).tolist() for text in pair] for pair in pairs)
    return figures | comparison.bound(loaded, [as_trained(*pair, loaded) for pair in encoded])


def prepare(folder: Path, options: Namespace) -> list[str]:
    """Make problems, select them by tools/prepare_tinygsm.py, and make tokenizer and dataset, once."""
    made, selected = folder / "made.jsonl", folder / "selected"
    length = comparison.sequence_length(options)
    if not (folder / "pairs.idx").exists():
        trainings.write_records(made, (p[:2] for p in islice(problems(1, False), options.count)), RECORD)
        held_out = [p[:2] for p in islice(problems(2, True), options.items)]
        trainings.write_records(folder / HELD_OUT, held_out)
        trainings.run_tool(
            *("tools/prepare_tinygsm.py", "--input", str(made), "--output", str(selected)),
            *("--held-out-share", "0"),
        )
    return trainings.pairs_settings(folder, selected / "train.jsonl", length, options.vocabulary)


TINYGSM = Comparison(
    variants=arms(STAGES),
    score=score,
    columns=tuple(DECODINGS),
    prepare=prepare,
    config="tinygsm",
    steps=2000,
    interval=250,
    count=50_000,
    items=400,
    curve_items=100,
    vocabulary=768,
)

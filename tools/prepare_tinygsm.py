"""Split TinyGSM's records, each a question and a Python program, into a training and a held-out file.

Dropped are records without a question, programs that do not define a Python function, duplicates, and
questions that share 13 words in a row with one of --benchmark (give GSM8K's test file). The split depends on
the question alone, so all its programs are on the same side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import orjson

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.base.files import replacing, write_json
from pipeline.base.progress import Progress
from pipeline.corpus.reading import DAMAGED, BadRecord
from pipeline.corpus.recipes.tinygsm import Selection
from pipeline.corpus.records import Keys, check_inputs, complaint, read_all
from pipeline.corpus.sources import Source

EVERY = 10_000  # records between two reports


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl, held_out.jsonl and counts.json, each completely or not at all."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        type=Path,
        help="jsonl or parquet, compressed or not",
    )
    parser.add_argument("--question-key", default="question", help="key of the word problem")
    parser.add_argument("--code-key", default="code", help="key of the program")
    parser.add_argument(
        "--benchmark",
        nargs="*",
        action="extend",
        type=Path,
        default=[],
        help="files whose records have the key question",
    )
    parser.add_argument("--held-out-share", type=float, default=0.001, help="share of questions to hold out")
    parser.add_argument("--output", required=True, type=Path, help="folder for the files")
    options = parser.parse_args(arguments)
    if not 0 <= options.held_out_share < 1:
        raise UserError(f"--held-out-share is {options.held_out_share}: give a share from 0 to below 1.")
    keys = Keys((options.question_key, options.code_key))
    check_inputs(options.input, keys)
    asked = [document.texts[0] for document in read_all(options.benchmark, Keys(("question",)))]
    selection = Selection(asked, options.held_out_share)

    def on_bad(source: Source, position: int, bad: BadRecord) -> None:
        if bad.reason == DAMAGED:  # the rest of the file would be lost
            raise UserError(complaint(source, position, bad))
        selection.counts[bad.reason] += 1

    paths = {part: options.output / f"{part}.jsonl" for part in ("train", "held_out")}
    with (
        closing(Progress(None, 0, "record")) as progress,
        replacing(paths["train"]) as train,
        replacing(paths["held_out"]) as held_out,
    ):
        for done, document in enumerate(read_all(options.input, keys, on_bad), start=1):
            part = selection.part(*document.texts)
            if part is not None:
                line = orjson.dumps(dict(zip(("prompt", "answer"), document.texts, strict=True)))
                (train if part == "train" else held_out).write(line + b"\n")
            if done % EVERY == 0:
                progress.advance(done)
                progress.report(", ".join(f"{n:,} {what}" for what, n in selection.counts.most_common()))
        if not selection.counts["train"]:
            raise UserError(
                f"--input leaves nothing to train on ({dict(selection.counts)}): check keys and --benchmark."
            )
    write_json(options.output / "counts.json", selection.counts)
    print("  ".join(f"{what}: {count:,}" for what, count in selection.counts.most_common()))


if __name__ == "__main__":
    run(main)

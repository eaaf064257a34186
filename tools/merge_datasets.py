"""Merge the parts made by an array of preprocessing tasks, or merge several datasets into one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.corpus.merge import merge_datasets, merge_parts
from pipeline.data.facts import check_replaceable


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge and print what was written."""
    parser = ToolParser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--parts", type=Path, help="PREFIX.parts of tools/preprocess_data.py; it is kept")
    what.add_argument(
        "--datasets", nargs="+", action="extend", type=Path, help="prefixes of complete datasets, in order"
    )
    parser.add_argument(
        "--output-prefix", type=Path, required=True, help="path of the new dataset, without suffix"
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=1,
        help="with --parts: write so many datasets, to be blended, instead of one",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="with --parts: folder of the tokenizer, if it has moved"
    )
    parser.add_argument(
        "--mixed-eos",
        action="store_true",
        help="with --datasets: allow datasets with and without --append-eos in one",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    options = parser.parse_args(arguments)
    if not options.overwrite:
        check_replaceable(options.output_prefix)
    if options.parts is not None:
        if options.mixed_eos:
            raise UserError("--mixed-eos needs --datasets: all parts have the same options.")
        made = merge_parts(options.parts, options.output_prefix, options.shards, tokenizer=options.tokenizer)
    elif options.shards != 1 or options.tokenizer:
        given = "--tokenizer is given" if options.tokenizer else f"--shards is {options.shards}"
        raise UserError(f"{given}: it needs --parts.")
    else:
        facts = merge_datasets(options.datasets, options.output_prefix, options.mixed_eos)
        made = [(options.output_prefix, facts)]
    for prefix, facts in made:
        print(f"wrote {prefix}: {facts.counts.describe()}")
    if len(made) > 1:
        print(f'for training: --data.prefixes "[{",".join(str(prefix) for prefix, _ in made)}]"')
    if options.parts is not None:
        print(f"{options.parts} is no longer needed: remove it once you have checked the dataset")


if __name__ == "__main__":
    run(main)

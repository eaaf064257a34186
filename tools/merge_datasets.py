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
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    options = parser.parse_args(arguments)
    if not options.overwrite:
        check_replaceable(options.output_prefix)
    if options.parts is not None:
        made = merge_parts(options.parts, options.output_prefix, options.shards)
    elif options.shards != 1:
        raise UserError(f"--shards is {options.shards}: it needs --parts.")
    else:
        made = [(options.output_prefix, merge_datasets(options.datasets, options.output_prefix))]
    for prefix, facts in made:
        print(f"wrote {prefix}: {facts.counts.describe()}")
    if len(made) > 1:
        print(f'for training: --data.prefixes "[{",".join(str(prefix) for prefix, _ in made)}]"')
    if options.parts is not None:
        print(f"{options.parts} is no longer needed: remove it once you have checked the dataset")


if __name__ == "__main__":
    run(main)

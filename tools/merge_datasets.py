"""Join the parts that an array of preprocessing tasks has made, or join several datasets to one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.corpus.merge import existing, merge_datasets, merge_parts


def main(arguments: Sequence[str] | None = None) -> None:
    """Merge and print what was written."""
    parser = ToolParser(__doc__ or "")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--parts", type=Path, help="PREFIX.parts of tools/preprocess_data.py; it is left in place"
    )
    what.add_argument(
        "--datasets", nargs="+", action="extend", type=Path, help="prefixes of whole datasets, in order"
    )
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the dataset, no suffix")
    parser.add_argument(
        "--shards", type=int, default=1, help="with --parts: make a blend of so many datasets instead of one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    options = parser.parse_args(arguments)
    found = existing(options.output_prefix)
    if found is not None and not options.overwrite:
        raise UserError(f"{found} exists: give --overwrite to replace it, or another --output-prefix.")
    if options.parts is not None:
        made = merge_parts(options.parts, options.output_prefix, options.shards)
    elif options.shards != 1:
        raise UserError("--shards goes with --parts.")
    else:
        made = [(options.output_prefix, merge_datasets(options.datasets, options.output_prefix))]
    for prefix, facts in made:
        print(f"wrote {prefix}: {facts.counts.describe()}")
    if len(made) > 1:
        print(f'for training: --data.prefixes "[{",".join(str(prefix) for prefix, _ in made)}]"')
    if options.parts is not None:
        print(f"{options.parts} is not needed any more: remove it when you have seen the dataset")


if __name__ == "__main__":
    run(main)

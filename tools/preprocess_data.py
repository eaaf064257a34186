"""Turn a corpus into an indexed dataset, PREFIX.bin, .idx and .json, that megatron-core reads.

An interrupted run goes on by the same command. On a cluster, start it as an array of tasks (--num-shards, or
SLURM's job arrays without any option) and join their parts with tools/merge_datasets.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, option, run
from pipeline.base.errors import UserError
from pipeline.corpus.arguments import add_corpus_arguments, corpus_keys
from pipeline.corpus.merge import parts_folder, quarantine_path
from pipeline.corpus.plan import Options, make_plan
from pipeline.corpus.preprocess import Work, preprocess
from pipeline.corpus.records import LONGEST_RECORD, MAX_BAD_FRACTION
from pipeline.corpus.sources import Hub


def build_parser() -> ToolParser:
    """Return the command line."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser, required=False)
    hub = parser.add_argument_group("a dataset that Hugging Face's datasets library streams")
    hub.add_argument("--hub-dataset", help="its name on the hub, or a local folder of data files")
    hub.add_argument("--hub-config", help="its configuration, if it has several")
    hub.add_argument("--hub-split", default="train", help="which split is read")
    hub.add_argument("--hub-revision", help="commit or tag; name one, so that the same data comes again")
    what = parser.add_argument_group("the dataset")
    what.add_argument("--tokenizer", type=Path, required=True, help="folder (tools/train_tokenizer.py)")
    what.add_argument("--output-prefix", type=Path, required=True, help="path of the dataset, no suffix")
    what.add_argument("--append-eos", action="store_true", help="close documents with end-of-sequence")
    what.add_argument("--min-tokens", type=int, default=0, help="leave out shorter documents")
    what.add_argument("--max-tokens", type=int, help="leave out longer documents")
    what.add_argument(
        "--deduplicate", action="store_true", help="leave out documents that came before, exactly"
    )
    what.add_argument(
        "--shuffle-seed", type=int, help="shuffle all documents; otherwise they keep their order"
    )
    bad = parser.add_argument_group("bad records")
    bad.add_argument(
        "--on-error",
        choices=["quarantine", "fail"],
        default="quarantine",
        help="put them into PREFIX.quarantine.jsonl, or stop at the first",
    )
    bad.add_argument(
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="stop when more of the records are bad",
    )
    bad.add_argument(
        "--max-document-bytes",
        type=int,
        default=LONGEST_RECORD,
        help="a longer line, paragraph or row is bad",
    )
    work = parser.add_argument_group("the work")
    work.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    work.add_argument(
        "--shard-index",
        type=int,
        default=(
            int(os.environ.get("SLURM_ARRAY_TASK_ID", "0")) - int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
        )
        // int(os.environ.get("SLURM_ARRAY_TASK_STEP", "1")),
        help="which share of the work this task does, from 0; of SLURM_ARRAY_TASK_ID",
    )
    work.add_argument(
        "--num-shards",
        type=int,
        default=int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")),
        help="tasks in all; of SLURM_ARRAY_TASK_COUNT",
    )
    work.add_argument(
        "--unit-bytes",
        type=int,
        help="input that a worker does in one go (default: total / 4096, 8 MiB to 1 GiB)",
    )
    work.add_argument(
        "--whole-texts",
        action="store_true",
        help="do not encode word by word where that gives the same tokens (slower)",
    )
    work.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    work.add_argument("--restart", action="store_true", help="throw away the parts of an earlier attempt")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise a `UserError` for options that cannot be."""
    for name in ("workers", "unit_bytes", "max_document_bytes", "num_shards"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{option(name)} is {value}: it must be 1 or more.")
    for name, least in (("min_tokens", 0), ("max_tokens", max(1, options.min_tokens)), ("shuffle_seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{option(name)} is {value}: it must be {least} or more.")
    if not 0 <= options.shard_index < options.num_shards:
        raise UserError(
            f"--shard-index is {options.shard_index}: it must be at least 0 and below --num-shards = "
            f"{options.num_shards}. Of an array with gaps, such as tasks that are started again, give both."
        )
    if not 0 <= options.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction is {options.max_bad_fraction}: it is a share, from 0 to 1.")
    if not options.input and options.hub_dataset is None:
        raise UserError("no corpus: give --input, or --hub-dataset.")
    if options.hub_dataset is None and (options.hub_config or options.hub_revision):
        raise UserError("--hub-config and --hub-revision belong to a --hub-dataset: name one.")
    prefix = options.output_prefix
    for given in options.input:
        if Path(given).is_dir() and prefix.resolve().is_relative_to(Path(given).resolve()):
            raise UserError(
                f"--output-prefix {prefix} is in the folder --input {given}, which would be read with the "
                "dataset's own files when the same command goes on: name a prefix elsewhere."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Preprocess and print what was written."""
    options = build_parser().parse_args(arguments)
    check(options)
    hub = None
    if options.hub_dataset is not None:
        hub = Hub(options.hub_dataset, options.hub_config, options.hub_split, options.hub_revision)
    asked = Options(
        corpus_keys(options),
        append_eos=options.append_eos,
        max_document_bytes=options.max_document_bytes,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        deduplicate=options.deduplicate,
        shuffle_seed=options.shuffle_seed,
    )
    plan = make_plan(options.input, hub, options.tokenizer, asked, options.unit_bytes)
    work = Work(
        options.workers,
        options.shard_index,
        options.num_shards,
        options.on_error,
        options.max_bad_fraction,
        options.overwrite,
        options.restart,
        options.whole_texts,
    )
    prefix = options.output_prefix
    summary = preprocess(plan, prefix, work)
    if summary.counts.bad and summary.complete:
        print(f"the bad records are in {quarantine_path(prefix)}")
    if summary.complete:
        print(f"wrote {prefix}: {summary.counts.describe()}")
        return
    print(f"shard {work.shard_index} of {work.num_shards} is done: {summary.counts.describe()}")
    print(
        f"when all are: python tools/merge_datasets.py --parts {parts_folder(prefix)} "
        f"--output-prefix {prefix}"
    )


if __name__ == "__main__":
    run(main)

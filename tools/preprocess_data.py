"""Turn a corpus into an indexed dataset, PREFIX.bin, .idx and .json, that megatron-core reads.

An interrupted run resumes with the same command. On a cluster, start an array of tasks (--num-shards, or a
SLURM job array without further options) and merge their parts with tools/merge_datasets.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, option, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.corpus.arguments import add_corpus_arguments, corpus_keys
from pipeline.corpus.partition import Options, make_partition
from pipeline.corpus.preprocess import Work, preprocess
from pipeline.corpus.records import LONGEST_RECORD, MAX_BAD_FRACTION
from pipeline.corpus.sources import Hub
from pipeline.data.paths import parts_folder, quarantine_path


def build_parser() -> ToolParser:
    """Return the command line."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser, required=False)
    hub = parser.add_argument_group("a dataset that Hugging Face's datasets library streams")
    hub.add_argument("--hub-dataset", help="its name on the hub, or a local folder of data files")
    hub.add_argument("--hub-config", help="its configuration, if it has several")
    hub.add_argument("--hub-split", default="train", help="the split to read")
    hub.add_argument("--hub-revision", help="commit or tag; give one to make the dataset reproducible")
    what = parser.add_argument_group("the dataset")
    what.add_argument("--tokenizer", type=Path, required=True, help="folder (tools/train_tokenizer.py)")
    what.add_argument("--output-prefix", type=Path, required=True, help="path of the dataset, without suffix")
    what.add_argument(
        "--append-eos", action="store_true", help="append the end-of-sequence token to documents"
    )
    what.add_argument("--min-tokens", type=int, default=0, help="drop shorter documents")
    what.add_argument("--max-tokens", type=int, help="drop longer documents")
    what.add_argument("--deduplicate", action="store_true", help="drop exact copies of earlier documents")
    what.add_argument(
        "--shuffle-seed", type=int, help="shuffle all documents (default: keep the order of the input)"
    )
    bad = parser.add_argument_group("bad records")
    bad.add_argument(
        "--on-error",
        choices=["quarantine", "fail"],
        default="quarantine",
        help="list them in PREFIX.quarantine.jsonl, or stop at the first",
    )
    bad.add_argument(
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="stop if a larger share of records is bad",
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
        help="which share of the work this task does, from 0; set by SLURM_ARRAY_TASK_ID",
    )
    work.add_argument(
        "--num-shards",
        type=int,
        default=int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1")),
        help="number of tasks; set by SLURM_ARRAY_TASK_COUNT",
    )
    work.add_argument(
        "--unit-bytes",
        type=int,
        help="bytes of input per unit of work (default: total / 4096, 8 MiB to 1 GiB)",
    )
    work.add_argument(
        "--whole-texts",
        action="store_true",
        help="never encode word by word, which is faster and gives the same tokens",
    )
    work.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    work.add_argument("--restart", action="store_true", help="discard the parts of an earlier attempt")
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise a `UserError` for invalid options."""
    require_at_least_one(options, "workers", "unit_bytes", "max_document_bytes", "num_shards")
    for name, least in (("min_tokens", 0), ("max_tokens", max(1, options.min_tokens)), ("shuffle_seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"{option(name)} is {value}: it must be {least} or more.")
    if not 0 <= options.shard_index < options.num_shards:
        raise UserError(
            f"--shard-index is {options.shard_index}: it must be at least 0 and below --num-shards = "
            f"{options.num_shards}. For an array with gaps, such as restarted tasks, give both."
        )
    if not 0 <= options.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction is {options.max_bad_fraction}: it must be a share from 0 to 1.")
    if not options.input and options.hub_dataset is None:
        raise UserError("no corpus: give --input, or --hub-dataset.")
    if options.hub_dataset is None and (options.hub_config or options.hub_revision):
        raise UserError("--hub-config and --hub-revision belong to --hub-dataset: give it too.")
    prefix = options.output_prefix
    for given in options.input:
        if Path(given).is_dir() and prefix.resolve().is_relative_to(Path(given).resolve()):
            raise UserError(
                f"--output-prefix {prefix} is in the folder --input {given}: a resumed run would read the "
                "dataset's own files. Choose a prefix elsewhere."
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Preprocess and print what was written."""
    options = build_parser().parse_args(arguments)
    check(options)
    hub = None
    if options.hub_dataset is not None:
        hub = Hub(options.hub_dataset, options.hub_config, options.hub_split, options.hub_revision)
    dataset_options = Options(
        corpus_keys(options),
        append_eos=options.append_eos,
        max_document_bytes=options.max_document_bytes,
        min_tokens=options.min_tokens,
        max_tokens=options.max_tokens,
        deduplicate=options.deduplicate,
        shuffle_seed=options.shuffle_seed,
    )
    partition = make_partition(options.input, hub, options.tokenizer, dataset_options, options.unit_bytes)
    work = Work(
        workers=options.workers,
        shard_index=options.shard_index,
        num_shards=options.num_shards,
        on_error=options.on_error,
        max_bad_fraction=options.max_bad_fraction,
        overwrite=options.overwrite,
        restart=options.restart,
        whole_texts=options.whole_texts,
    )
    prefix = options.output_prefix
    summary = preprocess(partition, prefix, work)
    if summary.counts.bad and summary.complete:
        print(f"the bad records are in {quarantine_path(prefix)}")
    if summary.complete:
        print(f"wrote {prefix}: {summary.counts.describe()}")
        return
    print(f"shard {work.shard_index} of {work.num_shards} is done: {summary.counts.describe()}")
    print(
        f"once all shards are done: python tools/merge_datasets.py --parts {parts_folder(prefix)} "
        f"--output-prefix {prefix}"
    )


if __name__ == "__main__":
    run(main)

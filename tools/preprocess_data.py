"""Turn a corpus into an indexed dataset, PREFIX.bin, .idx and .json, that megatron-core reads.

An interrupted run resumes with the same command. On a cluster, start an array of tasks (--num-shards, or a
SLURM job array without further options) and merge their parts with tools/merge_datasets.py.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, chosen, option, require_at_least_one, run
from pipeline.base.cpus import slurm_number, usable_cpus
from pipeline.base.errors import EXIT_DONE, EXIT_LOST_DATA, UserError
from pipeline.base.object_store import is_remote, place_of
from pipeline.corpus.arguments import add_corpus_arguments, corpus_keys
from pipeline.corpus.partition import Options, make_partition
from pipeline.corpus.preprocess import Summary, Work, preprocess
from pipeline.corpus.records import LONGEST_RECORD, MAX_BAD_FRACTION, Keys
from pipeline.corpus.remote_inputs import fetch_inputs
from pipeline.corpus.sources import Hub
from pipeline.corpus.standard_input import standard_input
from pipeline.data.paths import facts_path, parts_folder, quarantine_path
from pipeline.data.remote import is_uploaded, upload_dataset
from pipeline.data.tokenizer import Tokenizer


def build_parser() -> ToolParser:
    """Return the command line."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser)
    hub = parser.add_argument_group("a dataset that Hugging Face's datasets library streams")
    hub.add_argument("--hub-dataset", help="its name on the hub, or a local folder of data files")
    hub.add_argument("--hub-config", help="its configuration, if it has several")
    hub.add_argument("--hub-split", default="train", help="the split to read")
    hub.add_argument("--hub-revision", help="commit or tag; give one to make the dataset reproducible")
    what = parser.add_argument_group("the dataset")
    what.add_argument("--tokenizer", type=Path, required=True, help="folder (tools/train_tokenizer.py)")
    what.add_argument(
        "--output-prefix",
        required=True,
        help="path of the dataset, without suffix, or s3://BUCKET/...",
    )
    what.add_argument(
        "--append-eos", action="store_true", help="append the end-of-sequence token to documents"
    )
    what.add_argument("--min-tokens", type=int, default=0, help="drop shorter documents")
    what.add_argument("--max-tokens", type=int, help="drop longer documents")
    what.add_argument("--deduplicate", action="store_true", help="drop exact copies of earlier documents")
    what.add_argument(
        "--shuffle-seed", type=int, help="shuffle all documents (default: keep the order of the input)"
    )
    what.add_argument(
        "--local-folder",
        type=Path,
        help="for s3://: folder on a local disk that takes the inputs, and the dataset before it is uploaded",
    )
    bad = parser.add_argument_group("bad records")
    bad.add_argument(
        "--on-error",
        choices=["quarantine", "fail"],
        default="quarantine",
        help="list them in PREFIX.quarantine.jsonl, or stop at the first",
    )
    bad.add_argument(
        "--max-lost-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="stop if the tokenizer does not know a larger share of the characters",
    )
    bad.add_argument(
        "--accept-lost-files",
        action="store_true",
        help=f"exit with 0, not with {EXIT_LOST_DATA}, if files could not be read to their end",
    )
    bad.add_argument(
        "--max-document-bytes",
        type=int,
        default=LONGEST_RECORD,
        help="a longer line, paragraph or row is bad",
    )
    work = parser.add_argument_group("the work")
    work.add_argument(
        "--workers", type=int, default=usable_cpus(), help="processes; by default the CPUs it may use"
    )
    work.add_argument(
        "--shard-index",
        type=int,
        help="which share of the work this task does, from 0 (default: from SLURM_ARRAY_TASK_ID, or 0)",
    )
    work.add_argument(
        "--num-shards",
        type=int,
        help="number of tasks that share one corpus (default: from SLURM_ARRAY_TASK_COUNT, or 1); give 1 in "
        "an array whose tasks have each their own corpus",
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


OF_ITS_OWN = "give --num-shards 1 if each task has its own corpus and --output-prefix"


def set_shard(options: argparse.Namespace) -> bool:
    """Fill in --num-shards and --shard-index; return whether they are those of a SLURM array.

    Raises:
        UserError: if the tasks of the array seem to have each their own corpus.
    """
    task, first = slurm_number("SLURM_ARRAY_TASK_ID", 0), slurm_number("SLURM_ARRAY_TASK_MIN", 0)
    step, count = slurm_number("SLURM_ARRAY_TASK_STEP", 1), slurm_number("SLURM_ARRAY_TASK_COUNT", 1)
    is_implied = options.num_shards is None and count > 1
    if options.num_shards is None:
        options.num_shards = count
    if options.shard_index is None:
        options.shard_index = (task - first) // step if options.num_shards > 1 else 0
    if is_implied:
        tasks = set(range(first, first + count * step, step))
        of_prefix = numbers(str(options.output_prefix)) & tasks
        of_input = {number for given in options.input for number in numbers(given)}
        if of_prefix & of_input:
            raise UserError(
                f"--output-prefix {options.output_prefix} and --input have the number of a task of this "
                f"SLURM array: {OF_ITS_OWN}, or --num-shards {count} --shard-index {options.shard_index} if "
                "all tasks share one."
            )
    return is_implied


def set_prefix(options: argparse.Namespace) -> str | None:
    """Make --output-prefix a local path; return the URL to which the dataset is to be uploaded, if any.

    Raises:
        UserError: without --local-folder, or with it in vain; for the tasks of an array, whose parts must be
            on one file system.
    """
    given = options.output_prefix
    remote = next((each for each in (given, *options.input) if is_remote(each)), None)
    if remote is not None and options.local_folder is None:
        raise UserError(f"{remote}: --local-folder is missing: name a folder on a local disk, for a copy.")
    if remote is None and options.local_folder is not None:
        raise UserError(f"--local-folder {options.local_folder} is for s3://, and nothing is: leave it out.")
    if not is_remote(given):
        options.output_prefix = Path(given)
        return None
    if options.num_shards > 1:
        raise UserError(
            f"--output-prefix {given}: the tasks of an array share their parts by a file system: give a path "
            "there, and upload what tools/merge_datasets.py makes."
        )
    options.output_prefix = place_of(given, options.local_folder)
    return str(given)


def numbers(path: str) -> set[int]:
    """Return the numbers in the last part of a path."""
    return {int(digits) for digits in re.findall(r"\d+", Path(path).name)}


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
    if not 0 <= options.max_lost_fraction <= 1:
        raise UserError(
            f"--max-lost-fraction is {options.max_lost_fraction}: it must be a share from 0 to 1."
        )
    if not options.input and options.hub_dataset is None:
        raise UserError("no corpus: give --input, or --hub-dataset.")
    if options.hub_dataset is None and (options.hub_config or options.hub_revision):
        raise UserError("--hub-config and --hub-revision belong to --hub-dataset: give it too.")
    prefix = options.output_prefix
    facts_path(prefix)  # refuses a prefix without a name
    if "-" in options.input and options.num_shards > 1:
        raise UserError(
            "--input -: the tasks of an array cannot share standard input: write it to a file first."
        )
    for given in options.input:
        if Path(given).is_dir() and prefix.resolve().is_relative_to(Path(given).resolve()):
            raise UserError(
                f"--output-prefix {prefix} is in the folder --input {given}: a resumed run would read the "
                "dataset's own files. Choose a prefix elsewhere."
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """Preprocess and print what was written; return EXIT_LOST_DATA if files were not read to their end."""
    options = build_parser().parse_args(arguments)
    is_implied = set_shard(options)
    url = set_prefix(options)
    check(options)
    prefix = options.output_prefix
    keys = corpus_keys(options)
    if url is not None:
        is_uploaded(prefix, url, options.overwrite)  # refuses to replace another dataset, before the work
    if options.local_folder is not None:
        Tokenizer.load(options.tokenizer)  # before a corpus is fetched in vain
        options.input = fetch_inputs(options.input, options.local_folder)
    with standard_input(options.input, prefix) as options.input:
        summary = work_on(options, keys, is_implied)
    if url is not None and not is_uploaded(prefix, url, options.overwrite):
        upload_dataset(prefix, url)
    counts = summary.counts
    if summary.nothing_to_do:
        done = f"{prefix} is" if summary.complete else f"shard {options.shard_index} of {prefix} is"
        print(f"nothing to do: {done} complete, of the same input and options: {counts.describe()}")
    elif summary.complete:
        print(f"wrote {prefix}: {counts.describe()}")
    else:
        print(f"shard {options.shard_index} of {options.num_shards} is done: {counts.describe()}")
    if counts.bad and summary.complete:
        print(f"the bad records are in {quarantine_path(prefix)}")
    if not summary.complete:
        print(
            f"once all shards are done: python tools/merge_datasets.py --parts {parts_folder(prefix)} "
            f"--output-prefix {prefix}"
        )
    if counts.lost_bytes and not options.accept_lost_files:
        print(f"files could not be read to their end: exit code {EXIT_LOST_DATA} (--accept-lost-files: 0)")
        return EXIT_LOST_DATA
    return EXIT_DONE


def work_on(options: argparse.Namespace, keys: Keys, is_implied: bool) -> Summary:
    """Cut the corpus into units and do this task's share.

    Args:
        options: of the command line.
        keys: which values are read.
        is_implied: the share is that of a SLURM array, not of the command line.
    """
    hub = None
    if options.hub_dataset is not None:
        hub = Hub(options.hub_dataset, options.hub_config, options.hub_split, options.hub_revision)
    dataset_options = chosen(Options, options, keys=keys)
    partition = make_partition(options.input, hub, options.tokenizer, dataset_options, options.unit_bytes)
    if is_implied and len(partition.units) < options.num_shards:
        units = f"the corpus has {len(partition.units)} units of work for {options.num_shards} tasks"
        raise UserError(f"{units} of a SLURM array: {OF_ITS_OWN}, or start fewer tasks, or set --unit-bytes.")
    return preprocess(partition, options.output_prefix, chosen(Work, options))


if __name__ == "__main__":
    run(main)

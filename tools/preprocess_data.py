"""Turn a corpus into an indexed dataset, PREFIX.bin and PREFIX.idx, that megatron-core reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import ToolParser, UserError, run
from pipeline.data.arguments import add_corpus_arguments, corpus_keys
from pipeline.data.preprocess import existing, preprocess


def main(arguments: Sequence[str] | None = None) -> None:
    """Preprocess and print what was written."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder (tools/train_tokenizer.py)")
    parser.add_argument("--output-prefix", type=Path, required=True, help="path of the dataset, no suffix")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--append-eos", action="store_true", help="close documents with end-of-sequence")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing dataset")
    options = parser.parse_args(arguments)
    if options.workers < 1:
        raise UserError(f"--workers is {options.workers}: it must be 1 or more.")
    prefix = options.output_prefix
    found = existing(prefix)
    if found is not None and not options.overwrite:
        raise UserError(f"{found} exists: give --overwrite to replace it, or another --output-prefix.")
    keys = corpus_keys(options)
    facts = preprocess(options.input, options.tokenizer, prefix, keys, options.append_eos, options.workers)
    print(f"wrote {prefix}: {facts.documents:,} documents, {facts.tokens:,} tokens")


if __name__ == "__main__":
    run(main)

"""Make a tokenizer: train SentencePiece on a corpus, or import a Hugging Face tokenizer.json."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from pipeline.base.cli import ToolParser, option, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.base.progress import MEGABYTE, REPORT_SECONDS, Progress
from pipeline.corpus.arguments import add_corpus_arguments, corpus_keys
from pipeline.corpus.records import BadRecords, Keys, check_inputs, read_excerpt
from pipeline.corpus.sources import Source, find
from pipeline.corpus.tokenizer_making import MODEL_TYPES, import_tokenizer, train_tokenizer


def read_shown(sources: Sequence[Source], keys: Keys, megabytes: float) -> Iterator[str]:
    """Yield `megabytes` of text spread over a corpus, and show the progress."""
    total = round(sum(source.size for source in sources) / MEGABYTE, 1)
    read, reported = 0.0, time.monotonic()

    def show(behind: float, text: float) -> None:
        nonlocal read, reported
        read = text / MEGABYTE
        progress.advance(min(round(behind / MEGABYTE, 1), total))
        if time.monotonic() - reported > REPORT_SECONDS:
            reported = time.monotonic()
            progress.report(f"{read:,.0f} MB of text")

    with closing(Progress(total, 0, "MB")) as progress:
        bad = BadRecords()
        for document in read_excerpt(sources, keys, megabytes * MEGABYTE, show, bad):
            yield from document.texts
        skipped = f"; {bad.count:,} bad records are skipped" if bad.count else ""
        progress.say(f"training on {read:,.1f} MB of text, from {total:,} MB of files{skipped}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or import, and write the tokenizer."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser, required=False)
    parser.add_argument("--vocab-size", type=int, help="number of tokens; for char and word an upper bound")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram", help="SentencePiece model")
    parser.add_argument(
        "--sample-megabytes",
        type=float,
        default=300,
        help="text to train on, spread over a larger corpus; unigram needs 20 times as much memory",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument(
        "--import-json", type=Path, help="import this Hugging Face tokenizer.json instead of training"
    )
    for use in ("mask", "pad", "eos"):
        parser.add_argument(
            f"--{use}-token", help=f"with --import-json: its {use} token (default: one of the usual names)"
        )
    options = parser.parse_args(arguments)
    trains = options.import_json is None
    for name in ("mask_token", "pad_token", "eos_token") if trains else ("input", "vocab_size"):
        if getattr(options, name):
            where = "without" if trains else "with"
            raise UserError(f"{option(name)} has no effect {where} --import-json: leave it out.")
    if options.import_json is not None:
        names = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
        tokenizer, added = import_tokenizer(options.import_json, names, options.output)
        if added:
            print(f"added {', '.join(added)}: {options.import_json} has no such token")
    else:
        if not options.input:
            raise UserError("no corpus: give --input to train on, or --import-json.")
        if options.vocab_size is None:
            raise UserError("--vocab-size is missing: give the number of tokens, such as 32000.")
        require_at_least_one(options, "vocab_size")
        if not options.sample_megabytes > 0:
            raise UserError(f"--sample-megabytes is {options.sample_megabytes}: it must be above 0.")
        keys = corpus_keys(options)
        texts = read_shown(check_inputs(find(options.input), keys), keys, options.sample_megabytes)
        tokenizer = train_tokenizer(texts, options.vocab_size, options.model_type, options.output)
    print(
        f"wrote {options.output}: {tokenizer.vocab_size} tokens, mask {tokenizer.mask}, eos {tokenizer.eos}"
    )


if __name__ == "__main__":
    run(main)

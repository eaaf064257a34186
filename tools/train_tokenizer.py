"""Make a tokenizer: train SentencePiece on a corpus, or import a tokenizer.json or a SentencePiece model.

A trained tokenizer gives back every text; runs of spaces, such as the indentation of code, can be one token.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

from pipeline.base.cli import ToolParser, option, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.base.progress import MEGABYTE, REPORT_SECONDS, Progress, still
from pipeline.corpus.arguments import add_corpus_arguments, corpus_keys
from pipeline.corpus.records import BadRecords, Keys, check_inputs, read_excerpt
from pipeline.corpus.sources import Source, find
from pipeline.corpus.standard_input import standard_input
from pipeline.corpus.tokenizer_checks import check_import
from pipeline.corpus.tokenizer_making import import_sentencepiece, import_tokenizer, train_tokenizer
from pipeline.data.tokenizer import MODEL_TYPES


def read_shown(sources: Sequence[Source], keys: Keys, megabytes: float, bad: BadRecords) -> Iterator[str]:
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
        for document in read_excerpt(sources, keys, megabytes * MEGABYTE, show, bad):
            yield from document.texts
        skipped = f"; {bad.count:,} bad records are skipped" if bad.count else ""
        progress.say(f"training on {read:,.1f} MB of text, from {total:,} MB of files{skipped}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or import, and write the tokenizer."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser)
    parser.add_argument("--vocab-size", type=int, help="number of tokens; for char and word an upper bound")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram", help="SentencePiece model")
    parser.add_argument(
        "--sample-megabytes",
        type=float,
        default=300,
        help="text to train on, spread over a larger corpus; unigram needs 20 times as much memory",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--import-json", type=Path, help="import this Hugging Face tokenizer.json instead of training"
    )
    source.add_argument(
        "--import-model", type=Path, help="import this SentencePiece model, a tokenizer.model or spiece.model"
    )
    for use in ("mask", "pad", "eos"):
        parser.add_argument(
            f"--{use}-token", help=f"with an import: its {use} token (default: one of the usual names)"
        )
    options = parser.parse_args(arguments)
    path = options.import_json or options.import_model
    for name in ("mask_token", "pad_token", "eos_token") if path is None else ("input", "vocab_size"):
        if getattr(options, name):
            given = "--import-json" if path is None or options.import_json else "--import-model"
            where = "without" if path is None else "with"
            raise UserError(f"{option(name)} has no effect {where} {given}: leave it out.")
    if path is not None:
        names = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
        bring = import_tokenizer if options.import_json else import_sentencepiece
        tokenizer, added = bring(path, names, options.output)
        if added:
            print(f"added {', '.join(added)}: {path} has no such token")
        for change in check_import(tokenizer, path):
            print(f"text that does not come back: {change}")
    else:
        if not options.input:
            raise UserError("no corpus: give --input to train on, or --import-json, or --import-model.")
        if options.vocab_size is None:
            raise UserError("--vocab-size is missing: give the number of tokens, such as 32000.")
        require_at_least_one(options, "vocab_size")
        if not options.sample_megabytes > 0:
            raise UserError(f"--sample-megabytes is {options.sample_megabytes}: it must be above 0.")
        keys = corpus_keys(options)
        bad = BadRecords(options.max_bad_fraction)
        with standard_input(options.input, options.output) as inputs, still("training the tokenizer"):
            texts = read_shown(check_inputs(find(inputs), keys), keys, options.sample_megabytes, bad)
            tokenizer = train_tokenizer(texts, options.vocab_size, options.model_type, options.output)
    print(
        f"wrote {options.output}: {tokenizer.vocab_size} tokens, mask {tokenizer.mask}, eos {tokenizer.eos}"
    )


if __name__ == "__main__":
    run(main)

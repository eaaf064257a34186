"""Train a SentencePiece tokenizer on a corpus, or import a Hugging Face tokenizer.json, into a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import ToolParser, UserError, run
from pipeline.data.arguments import add_corpus_arguments, corpus_keys
from pipeline.data.records import check_inputs, read_all
from pipeline.data.sources import find
from pipeline.data.tokenizer import MODEL_TYPES, import_tokenizer, train_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train or import, and write the tokenizer."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser, required=False)
    parser.add_argument("--vocab-size", type=int, help="tokens; an upper bound for char and word")
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram", help="kind of pieces")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument("--import-json", type=Path, help="a Hugging Face tokenizer.json, instead of training")
    for use in ("mask", "pad", "eos"):
        parser.add_argument(
            f"--{use}-token", help=f"with --import-json: its {use} token (without the option: a usual name)"
        )
    options = parser.parse_args(arguments)
    if options.import_json is not None:
        names = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
        tokenizer, added = import_tokenizer(options.import_json, names, options.output)
        if added:
            print(f"added {', '.join(added)}: {options.import_json} has no such token")
    else:
        if not options.input:
            raise UserError("no corpus: give --input to train, or --import-json.")
        if options.vocab_size is None or options.vocab_size < 1:
            raise UserError(f"--vocab-size is {options.vocab_size}: it must be 1 or more.")
        keys = corpus_keys(options)
        paths = find(options.input)
        check_inputs(paths, keys)
        texts = (text for record in read_all(paths, keys) for text in record.texts)
        tokenizer = train_tokenizer(texts, options.vocab_size, options.model_type, options.output)
    print(
        f"wrote {options.output}: {tokenizer.vocab_size} tokens, mask {tokenizer.mask}, eos {tokenizer.eos}"
    )


if __name__ == "__main__":
    run(main)

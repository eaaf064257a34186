"""Train a SentencePiece tokenizer on a corpus: a folder with the model and its special ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import ToolParser, UserError, run
from pipeline.data.arguments import add_corpus_arguments, corpus_keys
from pipeline.data.records import check_inputs, read_all
from pipeline.data.tokenizer import MODEL_TYPES, train_tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and write the tokenizer."""
    parser = ToolParser(__doc__ or "")
    add_corpus_arguments(parser)
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens; an upper bound for char and word"
    )
    parser.add_argument("--model-type", choices=MODEL_TYPES, default="unigram", help="kind of pieces")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    options = parser.parse_args(arguments)
    if options.vocab_size < 1:
        raise UserError(f"--vocab-size is {options.vocab_size}: it must be 1 or more.")
    keys = corpus_keys(options)
    check_inputs(options.input, keys)
    texts = (text for record in read_all(options.input, keys) for text in record.texts)
    tokenizer = train_tokenizer(texts, options.vocab_size, options.model_type, options.output)
    print(
        f"wrote {options.output}: {tokenizer.vocab_size} tokens, mask {tokenizer.mask}, eos {tokenizer.eos}"
    )


if __name__ == "__main__":
    run(main)

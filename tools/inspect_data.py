"""Show what is in an indexed dataset: counts, lengths and decoded samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.cli import ToolParser, run
from pipeline.data.indexed import read_index, read_sequence, unigram_entropy
from pipeline.data.preprocess import read_facts
from pipeline.data.tokenizer import Tokenizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Print counts and samples."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("prefix", type=Path, help="path of the dataset, without .bin and .idx")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: the one it was made with)")
    parser.add_argument("--samples", type=int, default=3, help="documents to show")
    parser.add_argument("--entropy", action="store_true", help="also the entropy of the token frequencies")
    options = parser.parse_args(arguments)
    facts, index = read_facts(options.prefix), read_index(options.prefix)
    tokenizer = Tokenizer.load(options.tokenizer or Path(facts.tokenizer))
    per_document = 2 if facts.kind == "pairs" else 1
    lengths = np.asarray(index.lengths).reshape(-1, per_document).sum(axis=1)
    print(
        f"{options.prefix}: {facts.kind}, {facts.documents:,} documents, {facts.tokens:,} tokens "
        f"({index.dtype})"
    )
    print(f"tokenizer {facts.tokenizer}, {facts.vocab_size:,} tokens; eos appended: {facts.append_eos}")
    print(f"tokens a document: mean {lengths.mean():.1f}, shortest {lengths.min()}, longest {lengths.max()}")
    if options.entropy:
        entropy = unigram_entropy(options.prefix, index, (1,) if per_document == 2 else (0, 1))
        print(f"entropy of the {'answers' if per_document == 2 else 'text'}: {entropy:.4f} nats a token")
    names = ("prompt", "answer") if per_document == 2 else ("text",)
    for document in range(min(options.samples, facts.documents)):
        for part, name in enumerate(names):
            ids = read_sequence(options.prefix, index, document * per_document + part)
            print(f"[{document}] {name} ({len(ids)} tokens): {tokenizer.decode(ids)!r}")


if __name__ == "__main__":
    run(main)

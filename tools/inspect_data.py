"""Show an indexed dataset: its origin, counts, lengths and decoded documents; or verify it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.base.cli import ToolParser, in_colours, run
from pipeline.base.errors import EXIT_DONE, EXIT_FAILED, UserError
from pipeline.base.extras import extra
from pipeline.base.files import sha256_of
from pipeline.data.arrays import Array
from pipeline.data.facts import DatasetFacts, read_facts, stored_tokenizer
from pipeline.data.indexed import ENTRIES, IndexFacts, find_faults, read_index, read_sequence
from pipeline.data.paths import bin_path, idx_path
from pipeline.data.tokenizer import Tokenizer

COLOURS = {"prompt": "\033[36m", "answer": "\033[32m", "text": ""}
PLAIN = "\033[0m"


def show_facts(prefix: Path, facts: DatasetFacts, index: IndexFacts) -> None:
    """Print the contents of PREFIX.json."""
    print(
        f"{prefix}: {facts.kind}, {facts.documents:,} documents, {facts.tokens:,} tokens "
        f"({index.dtype}), sha256 of .bin {facts.sha256['bin'][:12]}"
    )
    print(f"from the corpus: {facts.counts.describe()}")
    ids = ", ".join(f"{name} {token}" for name, token in facts.special_ids.items())
    print(f"tokenizer {facts.tokenizer} ({facts.tokenizer_sha256[:12]}): {facts.vocab_size:,} tokens; {ids}")
    print(f"options: {json.dumps(facts.options)}")
    print("made with: " + ", ".join(f"{name} {number}" for name, number in facts.versions.items()))
    mean = facts.tokens / max(1, facts.documents)
    print(f"tokens per document: mean {mean:.1f}, longest {facts.longest_document}")
    print(
        "documents by length, up to so many tokens: "
        + ", ".join(f"{k}: {n:,}" for k, n in facts.length_histogram.items())
    )


def show_documents(
    prefix: Path, facts: DatasetFacts, index: IndexFacts, tokenizer: Tokenizer, count: int
) -> None:
    """Print the first documents; on a terminal prompt and answer are coloured.

    Raises:
        UserError: for a damaged one.
    """
    names = ("prompt", "answer") if facts.kind == "pairs" else ("text",)
    colours = in_colours(sys.stdout)
    for document in range(min(count, facts.documents)):
        for part, name in enumerate(names):
            number = document * len(names) + part
            try:
                ids = read_sequence(prefix, index, number)
                if not ((ids >= 0) & (ids < facts.vocab_size)).all():
                    raise ValueError("a token is not an id of the vocabulary")
            except (OSError, ValueError, OverflowError, MemoryError) as error:
                raise UserError(f"{prefix}: sequence {number} is damaged ({error}): see --verify.") from None
            text = repr(tokenizer.decode(ids))
            text = f"{COLOURS[name]}{text}{PLAIN}" if colours else text
            print(f"[{document}] {name} ({len(ids)} tokens): {text}")


def verify(prefix: Path, facts: DatasetFacts, index: IndexFacts) -> list[str]:
    """Return the faults of a dataset: wrong hashes, broken invariants, counts that do not add up."""
    faults = find_faults(prefix, index, facts.vocab_size)
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        found = sha256_of(path)
        if found != facts.sha256[name]:
            faults.append(f"{path} has sha256 {found[:12]}, PREFIX.json says {facts.sha256[name][:12]}")
    if not faults and not np.array_equal(occurrences(prefix, facts, index), histogram(facts)):
        faults.append("the token histograms are not those of the tokens")
    if sum(facts.length_histogram.values()) != facts.documents:
        faults.append("the length histogram does not add up to the documents")
    return faults


def histogram(facts: DatasetFacts) -> Array:
    """Return the histogram [V] of all tokens that PREFIX.json holds."""
    return np.sum([part for part in (facts.token_histogram, facts.prompt_histogram) if part], axis=0)


def occurrences(prefix: Path, facts: DatasetFacts, index: IndexFacts) -> Array:
    """Return the histogram [V] of the tokens in .bin."""
    counts = np.zeros(facts.vocab_size, np.int64)
    if index.tokens:
        tokens = np.memmap(bin_path(prefix), index.dtype, "r")
        for start in range(0, len(tokens), ENTRIES):
            counts += np.bincount(tokens[start : start + ENTRIES], minlength=facts.vocab_size)
    return counts


def plot_lengths(facts: DatasetFacts, index: IndexFacts, path: Path) -> None:
    """Plot a histogram of the lengths of the documents."""
    with extra("plots", "--histogram"):
        from matplotlib.figure import Figure
    step = 2 if facts.kind == "pairs" else 1
    lengths = np.asarray(index.lengths).reshape(-1, step).sum(axis=1, dtype=np.int64)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    top = max(1, int(lengths.max(initial=1)))
    axes.hist(lengths, bins=np.unique(np.geomspace(1, top + 1, 80).astype(np.int64)).tolist())
    axes.set(xscale="log", yscale="log", xlabel="tokens per document", ylabel="documents")
    axes.set_title(f"{facts.documents:,} documents, {facts.tokens:,} tokens")
    try:
        figure.savefig(path)
    except ValueError as error:  # its suffix
        raise UserError(f"--histogram {path}: {error}.") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Print facts and documents; with --verify exit with 1 if there are faults."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("prefix", type=Path, help="path of the dataset, without suffix")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: that of the dataset)")
    parser.add_argument("--samples", type=int, default=3, help="documents to show")
    parser.add_argument("--entropy", action="store_true", help="print the entropy of the tokens")
    parser.add_argument(
        "--verify", action="store_true", help="read everything, check hashes and every invariant"
    )
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="plot the lengths of the documents")
    options = parser.parse_args(arguments)
    facts, index = read_facts(options.prefix), read_index(options.prefix)
    tokenizer = Tokenizer.load(options.tokenizer or stored_tokenizer(facts.tokenizer, options.prefix))
    if tokenizer.sha256 != facts.tokenizer_sha256:
        raise UserError(
            f"--tokenizer {options.tokenizer or facts.tokenizer} is not the tokenizer of {options.prefix} "
            f"(sha256 {facts.tokenizer_sha256[:12]}): name that one."
        )
    show_facts(options.prefix, facts, index)
    if options.entropy:
        what = "answers" if facts.kind == "pairs" else "text"
        print(f"entropy of the {what}: {facts.entropy:.4f} nats per token")
    faults = verify(options.prefix, facts, index) if options.verify else []
    if not faults:
        show_documents(options.prefix, facts, index, tokenizer, options.samples)
    if options.histogram is not None:
        plot_lengths(facts, index, options.histogram)
        print(f"wrote {options.histogram}")
    if options.verify:
        for fault in faults:
            print(f"wrong: {fault}")
        print(f"verified {options.prefix}: {len(faults)} faults")
        return EXIT_FAILED if faults else EXIT_DONE
    return EXIT_DONE


if __name__ == "__main__":
    run(main)

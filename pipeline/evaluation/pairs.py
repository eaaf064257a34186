"""Read (prompt, answer) token ids for likelihoods from a dataset or a file of records."""

from __future__ import annotations

import itertools
from pathlib import Path

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.corpus.records import Keys, read_all
from pipeline.data.facts import read_facts
from pipeline.data.indexed import read_index, read_sequence
from pipeline.data.paths import idx_path
from pipeline.data.tokenizer import Tokenizer


def read_pairs(
    path: Path, keys: tuple[str, ...], loaded: Loaded, limit: int | None
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Return the token ids of (prompt, answer) pairs, and the number of excluded pairs.

    Texts longer than the trained sequence length are split into pieces, each scored on its own. Pairs longer
    than that are excluded.

    Args:
        path: PREFIX of an indexed dataset, or a file of records.
        keys: keys of a record: of a text, or of a prompt and an answer.
        loaded: the model, for its tokenizer and sequence length.
        limit: maximum number of documents to read; None = all.

    Raises:
        UserError: for a dataset of another tokenizer, a bad record, or nothing to score.
    """
    length = loaded.config.data.sequence_length
    pairs: list[tuple[list[int], list[int]]] = []
    for ids in read_documents(path, keys, loaded.tokenizer, limit):
        if len(ids) == 2:
            pairs.append(as_trained(ids[0], ids[1], loaded))
        else:
            pairs += [([], ids[0][start : start + length]) for start in range(0, len(ids[0]), length)]
    # A model with shifted prediction cannot score the only token of a piece.
    pairs = [pair for pair in pairs if len(pair[1]) > (loaded.model.shifted and not pair[0])]
    fitting = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= length]
    if not fitting:
        raise UserError(
            f"{path} holds nothing to score ({len(pairs)} pairs longer than {length}, the trained sequence "
            "length): give --data a dataset or file with text."
        )
    return fitting, len(pairs) - len(fitting)


def read_documents(
    path: Path, keys: tuple[str, ...], tokenizer: Tokenizer, limit: int | None
) -> list[list[list[int]]]:
    """Return the token ids of documents, each as [text] or [prompt, answer]; see `read_pairs`."""
    if idx_path(path).is_file():
        return _read_dataset(path, tokenizer, limit)
    records = itertools.islice(read_all([path], Keys(keys)), limit)
    return [[tokenizer.encode(text).tolist() for text in record.texts] for record in records]


def as_trained(prompt: list[int], answer: list[int], loaded: Loaded) -> tuple[list[int], list[int]]:
    """Return a pair with its answer padded as in training.

    If training padded answers with end-of-sequence tokens as targets, so does this. Otherwise the length of
    the sequence would reveal the end of the answer.
    """
    config = loaded.config.data
    missing = config.sequence_length - len(prompt) - len(answer) if config.padding == "eos_targets" else 0
    return prompt, answer + [loaded.tokenizer.eos] * missing


def _read_dataset(prefix: Path, tokenizer: Tokenizer, limit: int | None) -> list[list[list[int]]]:
    facts, index = read_facts(prefix), read_index(prefix)
    if facts.tokenizer_sha256 != tokenizer.sha256:
        raise UserError(
            f"dataset {prefix} was made with another tokenizer than the model's, {facts.tokenizer}: "
            "preprocess the corpus with the run's tokenizer."
        )
    parts = 2 if facts.kind == "pairs" else 1
    count = min(index.documents, index.documents if limit is None else limit)
    return [
        [read_sequence(prefix, index, document * parts + part).tolist() for part in range(parts)]
        for document in range(count)
    ]

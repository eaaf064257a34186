"""Causal models that score texts: a folder of transformers, or a checkpoint of an autoregressive run.

A scorer encodes a text by its own tokenizer, so models with different tokenizers compare. Text never becomes
a special token. The scorer's beginning of a sequence stands before each text, so that every token of the text
is scored; no end is scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from pipeline.base.errors import UserError
from pipeline.base.extras import extra
from pipeline.base.files import sha256_of
from pipeline.checkpoint.load_model import load_model
from pipeline.checkpoint.manifest import CONFIG_FILE, MANIFEST, find, is_export
from pipeline.evaluation.likelihood import score_answers

LOGITS = 2**27  # logits of one forward of a transformers model: half a GiB in float32
NAME = "--scorer"  # in messages
_NO_LIMIT = 2**20  # tokens; a tokenizer without a limit says 1e30


class Window(NamedTuple):
    """Token ids of one forward; those from `first` on are scored, each given all before it."""

    ids: list[int]
    first: int


class Scorer(Protocol):
    """A causal language model.

    Attributes:
        limit: tokens that it takes at once.
        begin: the token before a text.
        unknown: the token of characters that its tokenizer does not know; None or -1 if it knows all.
    """

    limit: int
    begin: int
    unknown: int | None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""

    def nll(self, windows: Sequence[Window]) -> list[float]:
        """Return the negative log-likelihood of the scored tokens of each window, in nats."""


@dataclass(frozen=True)
class TextScore:
    """The score of a text given a prompt.

    Attributes:
        nll: negative log-likelihood, nats.
        ids: the scored tokens, of the scorer.
        bytes: UTF-8 length of the text.
    """

    nll: float
    ids: list[int]
    bytes: int


def score_texts(scorer: Scorer, texts: Sequence[tuple[str, str]]) -> list[TextScore]:
    """Return the score of each text given its prompt.

    Prompt and text are encoded together. A token that spans both belongs to the text. A text that exceeds the
    scorer's limit is scored in windows, so that at least half of the limit stands before each token.

    Args:
        scorer: the model.
        texts: (prompt, text); both may be empty.
    """
    windows: list[Window] = []
    owners: list[int] = []
    scored: list[list[int]] = []
    for number, (prompt, text) in enumerate(texts):
        ids = scorer.encode(prompt + text)
        first = common_length(scorer.encode(prompt), ids) if text else len(ids)
        scored.append(ids[first:])
        for window in windows_of([scorer.begin, *ids], 1 + first, scorer.limit):
            windows.append(window)
            owners.append(number)
    totals = [0.0] * len(texts)
    for owner, nll in zip(owners, scorer.nll(windows), strict=True):
        totals[owner] += nll
    sizes = [len(text.encode()) for _, text in texts]
    return [TextScore(*one) for one in zip(totals, scored, sizes, strict=True)]


def common_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items both sequences begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def windows_of(ids: list[int], first: int, limit: int) -> Iterator[Window]:
    """Yield windows of at most `limit` >= 2 tokens that score ``ids[first:]``, each token once."""
    while first < len(ids):
        end = min(len(ids), max(limit, first + limit // 2))
        start = max(0, end - limit)
        yield Window(ids[start:end], first - start)
        first = end


class RunScorer:
    """An autoregressive run of ours; see `Scorer`. Its end-of-sequence token stands before a text."""

    def __init__(self, path: Path, device: torch.device, name: str = NAME) -> None:
        """Load the checkpoint; raise a `UserError` for a missing one, or a masked diffusion model."""
        self.loaded = load_model(path, device)
        if self.loaded.layout.attention != "causal":
            raise UserError(
                f"{name} {path} is a masked diffusion model, which only bounds a likelihood: give a run "
                "with objective.kind autoregressive, or a folder of a causal model."
            )
        self.limit = self.loaded.config.data.sequence_length
        self.begin: int = self.loaded.tokenizer.eos
        self.unknown: int | None = self.loaded.tokenizer.unk

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.loaded.tokenizer.encode(text).tolist()
        return ids

    def nll(self, windows: Sequence[Window]) -> list[float]:
        pairs = [(window.ids[: window.first], window.ids[window.first :]) for window in windows]
        return [score.nll for score in score_answers(self.loaded, pairs)]


class TransformersScorer:
    """A causal model of transformers in a folder; see `Scorer`."""

    def __init__(self, folder: Path, device: torch.device, name: str = NAME) -> None:
        """Load model and tokenizer, in the data type of the files; no code in the folder runs.

        Raises:
            UserError: for a folder without a causal model, or a tokenizer that does not fit it.
        """
        with extra("hf", name):
            from transformers import AutoModelForCausalLM, AutoTokenizer
            from transformers.utils import logging

        logging.disable_progress_bar()  # of loading; a second bar beside ours
        logging.set_verbosity_error()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype="auto")
        except (OSError, ValueError, KeyError, ImportError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"{name} {folder} holds no causal model that transformers loads without foreign code "
                f"({said}): give a folder such as GPT-2's, with config.json, weights and tokenizer."
            ) from None
        self.model = model.to(device).eval()
        self.limit = _limit(model, self.tokenizer)
        self.unknown: int | None = self.tokenizer.unk_token_id
        begins = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in begins if token is not None), None)
        if found is None:
            raise UserError(
                f"{name} {folder}: its tokenizer names neither bos_token nor eos_token: name one in "
                "tokenizer_config.json, it stands before each text."
            )
        self.begin = found
        self.rows = model.get_input_embeddings().weight.shape[0]
        highest = max(self.tokenizer.get_vocab().values(), default=0)
        if highest >= self.rows:
            raise UserError(
                f"{name} {folder}: its tokenizer has ids up to {highest}, but the model has {self.rows} "
                "rows: tokenizer and model are not of one kind; download the folder again."
            )
        if not self._is_causal():
            raise UserError(
                f"{name} {folder} is not causal: its predictions depend on later tokens. Give a model that "
                "predicts from left to right."
            )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return ids

    def nll(self, windows: Sequence[Window]) -> list[float]:
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids), reverse=True)
        found = [0.0] * len(windows)
        while order:
            longest = len(windows[order[0]].ids)
            count = max(1, LOGITS // (longest * self.rows))
            part, order = order[:count], order[count:]
            for i, nll in zip(part, self._forward([windows[i] for i in part], longest), strict=True):
                found[i] = nll
        return found

    @torch.no_grad()
    def _forward(self, windows: Sequence[Window], length: int) -> list[float]:
        """Return the score of each window; `length` is that of the longest."""
        logits = self._logits([window.ids for window in windows], length)
        totals = []
        for (ids, first), rows in zip(windows, logits, strict=True):
            targets = torch.tensor(ids[first:], device=rows.device)[:, None]
            likelihoods = rows[first - 1 : len(ids) - 1].float().log_softmax(dim=-1).gather(1, targets)
            totals.append(-likelihoods.double().sum())
        return torch.stack(totals).tolist()

    def _logits(self, rows: Sequence[list[int]], length: int) -> torch.Tensor:
        """Return the logits [B, length, V]; later tokens change nothing, so any token may pad a row."""
        tokens = torch.tensor([[*ids, *[0] * (length - len(ids))] for ids in rows])
        given = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in rows])
        device = self.model.device
        return self.model(input_ids=tokens.to(device), attention_mask=given.to(device)).logits

    @torch.no_grad()
    def _is_causal(self) -> bool:
        """Return whether the first prediction stays when the second token changes."""
        one, other = self._logits([[self.begin, 0], [self.begin, self.rows - 1]], 2)[:, 0].float()
        return torch.allclose(one, other, rtol=1e-3, atol=1e-3)


def _limit(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a model of transformers takes at once."""
    limits = (getattr(model.config, "max_position_embeddings", None), tokenizer.model_max_length)
    return min((int(limit) for limit in limits if limit and limit < _NO_LIMIT), default=_NO_LIMIT)


def find_scorer(path: Path, name: str = NAME) -> Path:
    """Return the folder of a scorer: `path` itself, or the checkpoint that it names (RUN, RUN:STEP).

    Args:
        path: what the user gave.
        name: of the option or setting that it was given by, for messages.

    Raises:
        UserError: if it holds neither a model of transformers nor a checkpoint.
    """
    if is_export(path):
        return path
    try:
        return find(path)[0]
    except UserError as error:
        raise UserError(
            f"{name}: {error} Or give a folder of a causal model of transformers, with {CONFIG_FILE}."
        ) from None


def load_scorer(folder: Path, device: torch.device, name: str = NAME) -> Scorer:
    """Return the scorer in a folder that `find_scorer` found; see the classes for errors."""
    kind = TransformersScorer if is_export(folder) else RunScorer
    return kind(folder, device, name)


def identity_of(folder: Path) -> str:
    """Return a hash that differs for another scorer; for transformers, of the files' names and sizes."""
    if not is_export(folder):
        return sha256_of(folder / MANIFEST)
    files = sorted((file.name, file.stat().st_size) for file in folder.iterdir() if file.is_file())
    return hashlib.sha256(repr((files, sha256_of(folder / CONFIG_FILE))).encode()).hexdigest()

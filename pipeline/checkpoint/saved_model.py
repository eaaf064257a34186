"""The model in a checkpoint, on the disk: settings, vocabulary, weights and tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Literal

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import MANIFEST, Manifest, check_hashes, find
from pipeline.config import Config
from pipeline.engine.build import open_weights
from pipeline.engine.ema import FILES, has_average
from pipeline.engine.weights import StoredWeights
from pipeline.model.batch import Vocabulary
from pipeline.ranks import Ranks

Weights = Literal["ema", "raw"]


@dataclass(frozen=True)
class SavedModel:
    """The model in a checkpoint.

    Attributes:
        folder: of the checkpoint.
        manifest: its manifest.
        averaged: whether its weights are the moving average; None = they are not used.
    """

    folder: Path
    manifest: Manifest
    averaged: bool | None

    @classmethod
    def find(
        cls,
        path: Path,
        weights: Weights | None = None,
        verify: bool = True,
        ranks: Ranks | None = None,
        untrained: bool = False,
    ) -> SavedModel:
        """Find a checkpoint and check its files; see `load_model` for arguments and errors."""
        folder, manifest = find(path)
        averaged = None if untrained else _takes_average(folder, weights)
        found = cls(folder, manifest, averaged)
        if verify:
            check_hashes(folder, manifest, found.needs, ranks or Ranks())
        return found

    @cached_property
    def config(self) -> Config:
        """Of the run."""
        return configuration.load(["--config", str(self.folder / "config.yaml")])

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the model."""
        return Vocabulary(**self.manifest.vocabulary)

    def needs(self, name: str) -> bool:
        """Return whether a file of the checkpoint, by its name, is read."""
        if name.startswith("model/"):
            return self.averaged is not None and fnmatch(name, f"model/{FILES}") == self.averaged
        return is_setting(name)

    def weights(self) -> StoredWeights:
        """Return its fp32 weights by name, not read yet; tied embeddings, which have two names, under one.

        Raises:
            UserError: when a file is damaged, or the manifest is of another vocabulary.
        """
        stored = dict(open_weights(self.folder / "model", bool(self.averaged)))
        rows, embedding = self.vocabulary.rows, stored.get("model.embed_tokens.weight")
        if embedding is not None and embedding.shape[0] != rows:
            raise UserError(
                f"{self.folder / MANIFEST}: vocabulary.rows is {rows}, but the weights have "
                f"{embedding.shape[0]}: restore the checkpoint."
            )
        if self.config.model.tie_embeddings:
            stored.pop("lm_head.weight", None)
        return stored


def is_setting(name: str) -> bool:
    """Return whether a file of a checkpoint holds its settings or its tokenizer."""
    return name == "config.yaml" or name.startswith("tokenizer/")


def _takes_average(folder: Path, weights: Weights | None) -> bool:
    """Return whether `weights` (see `load_model`) selects the moving average of the checkpoint `folder`.

    Raises:
        UserError: when `weights` is "ema" and the checkpoint has no moving average.
    """
    averaged = has_average(folder / "model")
    if weights == "ema" and not averaged:
        raise UserError(f"{folder} has no moving average (optimizer.ema_decay was not set): use 'raw'.")
    return averaged and weights != "raw"

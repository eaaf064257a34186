"""From a checkpoint to a model that can be decoded with or measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.checkpoint.manifest import find
from pipeline.config import Config
from pipeline.data.tokenizer import Tokenizer
from pipeline.engine.build import read_weights
from pipeline.engine.ema import has_average
from pipeline.engine.network import make_model
from pipeline.model.batch import Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives import decoding_layout
from pipeline.objectives.objective import Layout

Weights = Literal["ema", "raw"]
WEIGHTS_HELP = (
    "ema = the moving average, raw = the weights of the last step; by default ema where there is one"
)


@dataclass
class Loaded:
    """A trained model, ready to decode with.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: the tokenizer that it was trained with.
        config: the run that it comes from.
        step: optimizer steps that it was trained for.
    """

    model: MaskedDiffusionModel
    tokenizer: Tokenizer
    config: Config
    step: int

    @property
    def layout(self) -> Layout:
        """How the objective of the last step showed sequences to the model."""
        return decoding_layout(self.config, self.tokenizer.mask, self.step)


def load_model(
    path: Path,
    device: torch.device,
    untrained: bool = False,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loaded:
    """Return the model of a run's newest checkpoint, or of a given one; one process, any world size.

    Args:
        path: a run folder or a checkpoint folder.
        device: where the model is put.
        untrained: leave the initial weights in place, for a baseline.
        weights: ema = their moving average, raw = those of the last step; by default ema where there is one.
        dtype: of the weights and of what is computed; logits are fp32 in any case.

    Raises:
        UserError: when there is no checkpoint, it is damaged, or it lacks the weights that are asked for.
    """
    folder, manifest = find(path)
    config = configuration.load(["--config", str(folder / "config.yaml")])
    model = make_model(config, Vocabulary(**manifest.vocabulary))
    if not untrained:
        state = read_weights(folder / "model", takes_average(folder, weights))
        if config.model.tie_embeddings:  # one tensor under two names; a checkpoint may hold either
            state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return Loaded(model.to(device, dtype).eval(), tokenizer, config, 0 if untrained else manifest.step)


def takes_average(folder: Path, weights: Weights | None) -> bool:
    """Say whether `weights` (see `load_model`) means the moving average in the checkpoint `folder`.

    Raises:
        UserError: when there is none, and it is asked for.
    """
    averaged = has_average(folder / "model")
    if weights == "ema" and not averaged:
        raise UserError(f"{folder} holds no moving average: the run had no optimizer.ema_decay. Take 'raw'.")
    return averaged and weights != "raw"

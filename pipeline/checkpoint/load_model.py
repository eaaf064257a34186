"""Load a model from a checkpoint for decoding or evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.base.errors import UserError
from pipeline.checkpoint.saved_model import SavedModel, Weights
from pipeline.config import Config
from pipeline.data.tokenizer import TEMPLATE_FILE, Tokenizer
from pipeline.engine.module import make_model
from pipeline.engine.weights import StoredWeights
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives import decoding_layout
from pipeline.objectives.seam import Layout
from pipeline.ranks import Ranks


@dataclass
class Loaded:
    """A trained model, ready to decode with.

    Attributes:
        model: the network, in evaluation mode.
        tokenizer: the tokenizer of the run.
        config: the configuration of the run.
        step: optimizer steps trained; 0 for an untrained model.
        chat_template: what wrote the chats that the model was trained on; None if there were none.
    """

    model: MaskedDiffusionModel
    tokenizer: Tokenizer
    config: Config
    step: int
    chat_template: str | None = None

    @property
    def layout(self) -> Layout:
        """The layout that the objective used at `step`."""
        return decoding_layout(self.config, self.tokenizer.mask, self.step)

    def own_template(self, wanted_by: str, remedy: str) -> str:
        """Return the chat template of the training; raise a `UserError` with the remedy if there is none."""
        if self.chat_template is None:
            raise UserError(f"{wanted_by}: this model carries no chat template: {remedy}.")
        return self.chat_template


def load_model(
    path: Path,
    device: torch.device,
    untrained: bool = False,
    weights: Weights | None = None,
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
    ranks: Ranks | None = None,
) -> Loaded:
    """Load a checkpoint, written at any world size, into each process.

    Args:
        path: a run folder (its newest complete checkpoint), RUN:STEP, or a checkpoint folder.
        device: device of the model.
        untrained: keep the initial weights, as a baseline.
        weights: ema = the moving average, raw = the weights of the last step; None = ema if the checkpoint
            has it.
        dtype: of weights and activations; logits are always fp32.
        verify: compare the hashes of the files that are read.
        ranks: the processes that all load it, and share the hashing; they call this inside `ranks.agreeing`.

    Raises:
        UserError: when the checkpoint is missing or damaged, or lacks the requested weights.
    """
    saved = SavedModel.find(path, weights, verify, ranks, untrained)
    stored = {} if untrained else saved.weights()  # which are of the vocabulary that the model is made for
    model = make_model(saved.config, saved.vocabulary)
    if not untrained:
        tied = saved.config.model.tie_embeddings
        fill_weights(model, stored, tied, saved.folder / "config.yaml", "restore it")
    folder = saved.folder / "tokenizer"
    step = 0 if untrained else saved.manifest.step
    model = model.to(device, dtype).eval()
    return Loaded(model, Tokenizer.load(folder), saved.config, step, chat_template_beside(folder))


def fill_weights(
    model: MaskedDiffusionModel, stored: StoredWeights, tied: bool, described_by: Path, remedy: str
) -> None:
    """Fill a model with stored weights.

    Args:
        model: made for the settings in `described_by`.
        stored: its weights by name.
        tied: embedding and output layer are one tensor, stored under one name or two.
        described_by: the file with its settings, beside the weights.
        remedy: what to do if they do not fit, for the error.

    Raises:
        UserError: if they do not fit.
    """
    state = {name: weight.read() for name, weight in stored.items()}
    if tied:
        state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split()[:30])
        raise UserError(
            f"{described_by.parent}: the weights do not fit {described_by.name} ({reason}): {remedy}."
        ) from None


def chat_template_beside(tokenizer: Path) -> str | None:
    """Return the chat template in the folder of a tokenizer, if any; raise a `UserError` if damaged."""
    path = tokenizer / TEMPLATE_FILE
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error.reason}): it must be UTF-8. Restore it.") from None

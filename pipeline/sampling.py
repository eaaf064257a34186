"""Decoding: fill masked positions in the order of the model's confidence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from pipeline import checkpoint, objectives
from pipeline import config as configuration
from pipeline.cli import UserError
from pipeline.config import Config
from pipeline.data.batch import ANSWER, PADDING, PROMPT, Samples
from pipeline.data.tokenizer import Tokenizer
from pipeline.ema import has_average
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import EVERYTHING, MaskedDiffusionModel
from pipeline.objectives.base import Layout, take_highest
from pipeline.runtime import make_model, read_weights

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
        schedule = objectives.build(self.config, self.tokenizer.mask, has_padding=True)
        return schedule.at(max(1, self.step)).layout


def load_model(
    path: Path, device: torch.device, untrained: bool = False, weights: Weights | None = None
) -> Loaded:
    """Return the model of a run's newest checkpoint, or of a given one; one process, any world size.

    Args:
        path: a run folder or a checkpoint folder.
        device: where the model is put.
        untrained: leave the initial weights in place, for a baseline.
        weights: ema = their moving average, raw = those of the last step; by default ema where there is one.

    Raises:
        UserError: when there is no checkpoint, it is damaged, or it lacks the weights that are asked for.
    """
    folder, manifest = checkpoint.find(path)
    config = configuration.load(["--config", str(folder / "config.yaml")])
    model = make_model(config, Vocabulary(**manifest.vocabulary))
    if not untrained:
        state = read_weights(folder / "model", takes_average(folder, weights))
        if config.model.tie_embeddings:  # one tensor under two names; a checkpoint may hold either
            state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
        model.load_state_dict(state)
    tokenizer = Tokenizer.load(folder / "tokenizer")
    return Loaded(model.to(device).eval(), tokenizer, config, 0 if untrained else manifest.step)


def takes_average(folder: Path, weights: Weights | None) -> bool:
    """Say whether `weights` (see `load_model`) means the moving average in the checkpoint `folder`.

    Raises:
        UserError: when there is none, and it is asked for.
    """
    averaged = has_average(folder / "model")
    if weights == "ema" and not averaged:
        raise UserError(f"{folder} holds no moving average: the run had no optimizer.ema_decay. Take 'raw'.")
    return averaged and weights != "raw"


@torch.no_grad()
def decode(
    model: MaskedDiffusionModel,
    tokens: Tensor,
    masked: Tensor,
    tokens_per_step: int = 1,
    attention_mask: Tensor | None = None,
    visibility: Visibility = EVERYTHING,
) -> Tensor:
    """Fill the masked positions, at each step those with the highest max_v p(v | xt), by argmax_v.

    Of a model trained in blocks, or from left to right, the blocks are filled one after another.

    Args:
        model: the network.
        tokens: [B, L] int64; masked positions may hold anything.
        masked: [B, L] bool; rows may have different counts.
        tokens_per_step: positions filled in each row at a step.
        attention_mask: [B, L] bool, False at padding.
        visibility: which positions see which others (`Layout.decoding`).

    Returns:
        [B, L] int64 without mask tokens at the masked positions.
    """
    tokens, masked = tokens.clone(), masked.clone()
    count = torch.full((len(tokens),), tokens_per_step, device=tokens.device)
    while masked.any():
        candidates = masked
        if visibility.blocks is not None:
            last = visibility.blocks.max() + 1
            blocks = torch.where(masked, visibility.blocks, last)  # [B, L]
            candidates = masked & (blocks == blocks.amin(dim=1, keepdim=True))
        rows = candidates.flatten().nonzero().squeeze(1)  # [R]
        inputs = tokens.masked_fill(masked, model.lm_head.vocabulary.mask_id)
        logits = model.logits(inputs, rows, attention_mask, visibility)
        best, choice = logits.max(dim=-1)
        confidence = torch.full(masked.shape, -torch.inf, device=tokens.device)
        confidence.view(-1)[rows] = torch.exp(best - logits.logsumexp(dim=-1))
        chosen = tokens.flatten().index_copy(0, rows, choice).view_as(tokens)
        revealed = take_highest(candidates, confidence, count)
        tokens = torch.where(revealed, chosen, tokens)
        masked &= ~revealed
    return tokens


def complete(
    loaded: Loaded,
    prompts: Sequence[str],
    length: int | None = None,
    tokens_per_step: int = 1,
    batch_size: int = 64,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """Return the model's continuation of each prompt.

    Args:
        loaded: the model.
        prompts: texts, of any lengths.
        length: tokens of a continuation; by default up to the sequence length that the model was trained on.
        tokens_per_step: positions filled at a step.
        batch_size: prompts decoded together.
        on_progress: called with the number of prompts done.

    Raises:
        UserError: when prompt and continuation exceed the trained sequence length, or a model that needs a
            first token is given none.
    """
    limit = loaded.config.data.sequence_length
    encoded = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    results = []
    for start in range(0, len(encoded), batch_size):
        part = encoded[start : start + batch_size]
        ends = [len(ids) + length if length else limit for ids in part]
        for ids, end in zip(part, ends, strict=True):
            if end > limit or end <= len(ids):
                raise UserError(
                    f"a prompt of {len(ids)} tokens with an answer of {length or 'at least 1'} exceeds the "
                    f"sequence length that the model was trained on, {limit}: shorten one of them."
                )
            if len(ids) == 0 and loaded.model.shifted:
                raise UserError(
                    "a prompt is empty, but with model.prediction = 'shifted' each token is predicted at the "
                    "one before it: give prompts of at least one token."
                )
        device = loaded.model.lm_head.weight.device
        tokens = torch.full((len(part), max(ends)), loaded.tokenizer.pad, device=device)
        masked = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (ids, end) in enumerate(zip(part, ends, strict=True)):
            tokens[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            masked[row, len(ids) : end] = True
        present = torch.arange(max(ends), device=device) < torch.tensor(ends, device=device)[:, None]
        roles = torch.where(present, torch.where(masked, ANSWER, PROMPT), PADDING)
        visibility = loaded.layout.decoding(Samples(tokens, roles, torch.arange(len(part), device=device)))
        shown = None if present.all() else present
        filled = decode(loaded.model, tokens, masked, tokens_per_step, shown, visibility)
        for row, (ids, end) in enumerate(zip(part, ends, strict=True)):
            results.append(_text(loaded.tokenizer, filled[row, len(ids) : end].tolist()))
        on_progress(len(results))
    return results


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Return the text of an answer up to its end-of-sequence token."""
    return tokenizer.decode(ids[: ids.index(tokenizer.eos)] if tokenizer.eos in ids else ids)

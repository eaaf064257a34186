"""Likelihood of an answer given its prompt: a bound for masked diffusion, exact for autoregressive models.

A masked diffusion model bounds the negative log-likelihood of an answer of L tokens (LLaDA, arXiv 2502.09992,
equation 6; equal to the continuous-time bound of MDLM, arXiv 2406.07524, and to the mean over all orders of
filling the answer token by token, RADD, arXiv 2406.03736):

    -log p(x0)  <=  E  L/n  sum over the masked positions of  -log p(x0_i | xt),    n ~ U{1..L} of them masked

The bound is tight if the model's predictions are the conditionals of one joint distribution. For a model
trained in blocks it is the sum of the blocks' bounds, each given the clean blocks before it (BD3-LM, arXiv
2503.09573). For an autoregressive model the chain rule gives the exact likelihood.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded
from pipeline.data.examples import Examples
from pipeline.decoding.batching import MaskedSequence, stack
from pipeline.evaluation.defaults import DRAWS
from pipeline.model.batch import HeadOutput, MaskedBatch
from pipeline.objectives.autoregressive import Autoregressive
from pipeline.objectives.random_masking import RandomMasking
from pipeline.objectives.seam import Chains, ChainState, Layout, Objective, model_input

Evaluate = Callable[[MaskedBatch], HeadOutput]


class LikelihoodMasks(RandomMasking):
    """The masks of an estimate: stage d of a chain is draw d of D.

    A chain of L tokens is masked in one of three ways. If D >= 2^L - 1, every mask is used and the result has
    no sampling error. Else if D >= L, every n gets D/L draws, rounded up or down, so the sum over n is exact.
    Else n is stratified, with one draw in each D-th part of (0, 1).
    """

    def __init__(self, seed: int, layout: Layout, draws: int) -> None:
        """Create the masks of `draws` draws from `seed`."""
        super().__init__(seed, layout)
        self.draws = draws

    def enumerated(self, chains: Chains) -> Tensor:
        """Return which chains use every mask, [B, N] bool."""
        return chains.length < (self.draws + 1).bit_length()

    def masks(self, chains: Chains) -> Tensor:
        """Return the number of masks of each enumerated chain, [B, N]; 1 for the others."""
        return torch.where(self.enumerated(chains), (1 << chains.length.clamp(max=62)) - 1, 1).clamp(min=1)

    def ratio(self, chains: Chains, stage: Tensor) -> Tensor:
        """Return the mask ratio [B, N] in [0, 1); n = 1 + floor(ratio x L) positions are masked."""
        length = chains.length.clamp(min=1)
        stratified = (stage + super().ratio(chains, stage)) / self.draws
        each = (stage * length // self.draws + 0.5) / length
        return torch.where(length <= self.draws, each, stratified)

    def draw(self, chains: Chains, stage: Tensor) -> Tensor:
        """Return the masks [B, L] bool of draws `stage` [B, N]."""
        bits = chains.spread(1 + stage % self.masks(chains))  # bit i masks position i of the chain
        counted = (bits >> chains.rank.clamp(0, 62)) & 1 == 1
        drawn = super().draw(chains, stage)
        return chains.answer & torch.where(chains.spread(self.enumerated(chains)), counted, drawn)

    def weights(self, chains: Chains, state: ChainState) -> Tensor:
        """Return the weight of each masked position in the sum over all D draws, [B, L] float64."""
        draws, length, masks = self.draws, chains.length.clamp(min=1), self.masks(chains)
        n = chains.sums(state.masked).clamp(min=1)
        of_n = _ceil(n * draws, length) - _ceil((n - 1) * draws, length)  # draws with n positions
        share = torch.where(length <= draws, 1 / (of_n.clamp(min=1) * length), 1 / draws)
        repeats = draws // masks + (state.stage % masks < draws % masks)  # draws of this mask
        of_mask = torch.exp(-_log_choose(length, n)) / (repeats * length)
        share = torch.where(self.enumerated(chains), of_mask, share)
        return chains.spread(share * length / n)


def _ceil(a: Tensor, b: Tensor) -> Tensor:
    return -(-a // b)


def _log_choose(length: Tensor, n: Tensor) -> Tensor:
    """Return the logarithm of the binomial coefficient (length, n), float64."""
    top, bottom = length.double() + 1, n.double() + 1
    return torch.lgamma(top) - torch.lgamma(bottom) - torch.lgamma(top - n)


@dataclass(frozen=True)
class Estimates:
    """Likelihoods of B answers.

    Attributes:
        nll: [B] float64, nats: an estimate of the bound on -log p(answer | prompt); exact for autoregressive
            models.
        standard_error: [B] float64, nats: sampling error of the masks; 0 without random masks.
        tokens: [B] int64, number of scored tokens.
    """

    nll: Tensor
    standard_error: Tensor
    tokens: Tensor


@torch.no_grad()
def estimate(
    evaluate: Evaluate,
    layout: Layout,
    examples: Examples,
    step: int,
    draws: int = DRAWS,
    batch_size: int = 64,
    seed: int = 0,
    scored: Tensor | None = None,
) -> Estimates:
    """Return the likelihood of each answer given its prompt.

    Run ceil(B x D / batch_size) forwards, with D = `draws`, or D = 1 for an autoregressive model. Ranks with
    equal B run equally many, as ZeRO-3 requires. The standard error comes from differences between
    neighbouring draws. These include the difference between strata, so it is biased upwards.

    Args:
        evaluate: runs the model on a batch: `Engine.evaluate`, or the model.
        layout: the layout of the objective (`Objective.layout`, `Loaded.layout`).
        examples: B sequences; their ids seed the masks, so the batch does not matter.
        step: the optimizer step of the model.
        draws: masks per sequence, an even number.
        batch_size: masked sequences per forward.
        seed: seed of the masks.
        scored: [B, L] bool, the positions to score; by default all answers.

    Raises:
        UserError: for an odd number of draws, or fewer than 2.
    """
    if draws < 2 or draws % 2:
        raise UserError(f"draws is {draws}: give an even number, 2 or more; the standard error needs pairs.")
    exact = layout.attention == "causal"
    each = 1 if exact else draws
    device, (count, length) = examples.tokens.device, examples.tokens.shape
    totals = torch.zeros(2, count * each, dtype=torch.float64, device=device)  # all masks, random masks
    objective: Objective = Autoregressive(layout) if exact else LikelihoodMasks(seed, layout, draws)
    for start in range(0, count * each, batch_size):
        place = torch.arange(start, min(start + batch_size, count * each), device=device)
        row = place // each
        part = examples.mapped(lambda x, row=row: x[row])
        chains = layout.chains(part)
        if scored is not None:
            chains = chains.restricted(scored[row])
        state = objective.begin(chains, place[:, None] % each, step)
        inputs = model_input(objective, chains, state, int(state.masked.sum()), step)
        weights, random = torch.ones_like(state.masked, dtype=torch.float64), torch.zeros_like(state.masked)
        if isinstance(objective, LikelihoodMasks):
            weights = objective.weights(chains, state)
            random = ~chains.spread(objective.enumerated(chains))
        nll = evaluate(inputs).nll.double() * weights.flatten()[inputs.rows]  # [R]
        of_random = nll * random.flatten()[inputs.rows]
        totals.index_add_(1, start + inputs.rows // length, torch.stack([nll, of_random]))
    nll, of_random = totals.view(2, count, each)
    error = torch.zeros(count, dtype=torch.float64, device=device)
    if not exact:
        error = (of_random[:, ::2] - of_random[:, 1::2]).square().sum(dim=1).sqrt()
    asked = layout.chains(examples).answer
    return Estimates(nll.sum(dim=1), error, (asked if scored is None else asked & scored).sum(dim=1))


@dataclass(frozen=True)
class AnswerScore:
    """The likelihood of one answer.

    Attributes:
        nll: see `Estimates`, nats.
        standard_error: see `Estimates`, nats.
        tokens: number of scored tokens.
        bytes: UTF-8 length of the text of the scored tokens.
    """

    nll: float
    standard_error: float
    tokens: int
    bytes: int


def score_answers(
    loaded: Loaded,
    pairs: Sequence[tuple[list[int], list[int]]],
    draws: int = DRAWS,
    batch_size: int = 64,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda done: None,
    numbers: Sequence[int] | None = None,
) -> list[AnswerScore]:
    """Return the likelihood of each answer given its prompt.

    Answers with at most `draws` masks are scored with all masks, without sampling.

    Args:
        loaded: the model.
        pairs: token ids of (prompt, answer); prompts may be empty. A model with shifted prediction does not
            score the first token of a sequence.
        draws: masks per answer, an even number.
        batch_size: masked sequences per forward.
        seed: seed of the masks, together with the id of the pair; the batch does not matter.
        on_progress: called with the number of finished pairs.
        numbers: ids of the pairs; by default their indices.

    Raises:
        UserError: for a pair without an answer, or one that exceeds the trained sequence length.
    """
    limit = loaded.config.data.sequence_length
    for prompt, answer in pairs:
        if not answer or len(prompt) + len(answer) > limit:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with an answer of {len(answer)} cannot be scored: give an "
                f"answer of 1 token or more, and at most {limit} in all, the trained sequence length."
            )
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][1]), len(pairs[i][0])))
    scores: dict[int, AnswerScore] = {}
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        seeds = part if numbers is None else [numbers[i] for i in part]
        examples, masked = stack(loaded, [MaskedSequence.behind(*pairs[i]) for i in part], seeds)
        masks = 2 ** min(62, len(pairs[part[-1]][1]))  # even; one more than the longest answer's masks
        found = estimate(
            loaded.model,
            loaded.layout,
            examples,
            loaded.step,
            min(draws, masks),
            batch_size,
            seed,
            masked,
        )
        facts = found.nll.tolist(), found.standard_error.tolist(), found.tokens.tolist()
        for i, nll, error, tokens in zip(part, *facts, strict=True):
            answer = pairs[i][1]
            text = loaded.tokenizer.decode(answer[len(answer) - tokens :])
            scores[i] = AnswerScore(nll, error, tokens, len(text.encode()))
        on_progress(len(scores))
    return [scores[i] for i in range(len(pairs))]


@dataclass(frozen=True)
class Likelihood:
    """The likelihood of a set of sequences.

    Attributes:
        nll: mean over sequences, nats; exact for autoregressive models, else a bound.
        standard_error: standard error of this mean, nats; it includes the sampling error of the masks.
        perplexity: exp(nats per token).
        bits_per_byte: bits per byte of text.
        sequences: number of sequences.
    """

    nll: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    sequences: int


def likelihood_totals(nll: Tensor, tokens: Tensor, text_bytes: Tensor) -> Tensor:
    """Return the sums for `likelihood_of`, [5] float64; sums of several ranks may be added.

    Args:
        nll: [B] float64, nats.
        tokens: [B], scored tokens.
        text_bytes: [B], bytes of their text.
    """
    nll = nll.double()
    return torch.stack(
        [torch.ones_like(nll).sum(), nll.sum(), nll.square().sum(), tokens.sum(), text_bytes.sum()]
    )


def likelihood_of(totals: Tensor) -> Likelihood:
    """Return the likelihood of a set of sequences from its `likelihood_totals`."""
    count, nll, squares, tokens, text_bytes = totals.tolist()
    spread = max(0.0, squares / count - (nll / count) ** 2)
    return Likelihood(
        nll=nll / count,
        standard_error=math.sqrt(spread / (count - 1)) if count > 1 else math.nan,
        perplexity=math.exp(nll / tokens),
        bits_per_byte=nll / math.log(2) / text_bytes if text_bytes else math.nan,
        sequences=int(count),
    )

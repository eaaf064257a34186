"""Count the FLOPs of a training step from the shapes of its matrix products.

A multiply-add counts as two FLOPs. As is usual, everything but matrix products (norms, softmax, rotary
embeddings, AdamW) is left out: for models of a relevant size it is below 1%.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.config import Config, ObjectiveConfig
from pipeline.engine.optimizer import MUON_ITERATIONS

BACKWARD = 2  # the backward of a product is two products of its size


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over all ranks, forward and backward.

    The first four add up to the model FLOPs, the basis of MFU (PaLM, arXiv 2204.02311, appendix B). With
    `recomputed` they are the executed FLOPs, the basis of HFU.

    Attributes:
        projections: query, key, value and output projections.
        attention: QK^T and attention weights times V, for visible query-key pairs only.
        swiglu: the three projections of each SwiGLU.
        head: logits of the masked rows only; the embedding is a look-up and costs nothing.
        recomputed: products that engine.activation_checkpointing repeats in the backward.
    """

    projections: float
    attention: float
    swiglu: float
    head: float
    recomputed: float

    @property
    def model(self) -> float:
        """Model FLOPs: the work that the result needs."""
        return self.projections + self.attention + self.swiglu + self.head

    @property
    def executed(self) -> float:
        """Executed FLOPs, including recomputation."""
        return self.model + self.recomputed


def step_flops(
    config: Config,
    vocabulary_rows: int,
    masked_rows: float,
    step: int = 1,
    prompt_length: float = 0,
    within: float | None = None,
) -> Flops:
    """Return the FLOPs of optimizer step `step`, over all ranks and micro-batches.

    Sequence parallelism splits the same products within a group, so the sum does not change. Kernel overhead
    is not counted: flash and flex attention recompute QK^T in the backward (a quarter of `attention`), and
    dense masks also compute invisible pairs.

    Args:
        config: configuration of the run.
        vocabulary_rows: rows of the output matrix (`Vocabulary.rows`).
        masked_rows: positions with logits in the global batch; may be a mean.
        step: optimizer step, from 1; selects the objective if the run switches, and the batch if it grows.
        prompt_length: mean prompt length in tokens; in block diffusion the prompt is its own block.
        within: pairs of a sequence that lie in one document, see `document_pairs`; None = all.
    """
    model, sequences, length = config.model, config.train.batch_at(step), config.data.sequence_length
    inputs = sequences * length * copies(config.objective, step)
    pairs = sequences * visible_pairs(config.objective, step, length, prompt_length, within)
    width, kv_width = model.heads * model.head_width, (model.kv_heads or model.heads) * model.head_width
    forward = {
        "projections": 2 * inputs * model.hidden_size * (2 * width + 2 * kv_width) * model.layers,
        "attention": 2 * pairs * 2 * width * model.layers,
        "swiglu": 2 * inputs * 3 * model.hidden_size * model.intermediate_size * model.layers,
        "head": 2 * masked_rows * vocabulary_rows * model.hidden_size,
    }
    recomputed = 0.0
    if config.engine.activation_checkpointing == "blocks":
        # torch stops recomputing once the backward has what it needs: before the down projection of a block,
        # and for "swiglu" before any product.
        recomputed = forward["projections"] + forward["attention"] + forward["swiglu"] * 2 / 3
    return Flops(**{part: (1 + BACKWARD) * once for part, once in forward.items()}, recomputed=recomputed)


def is_autoregressive(settings: ObjectiveConfig, step: int) -> bool:
    """Return whether `step` (from 1) trains the autoregressive objective."""
    return settings.kind_at(step) == "autoregressive"


def copies(settings: ObjectiveConfig, step: int) -> int:
    """Return the number of positions computed per token: 2 with a clean copy, [xt ; x0], else 1."""
    return 2 if settings.block_size is not None and not is_autoregressive(settings, step) else 1


def visible_pairs(
    settings: ObjectiveConfig,
    step: int,
    length: int,
    prompt_length: float = 0,
    within: float | None = None,
) -> float:
    """Return the number of visible query-key pairs in one sequence of `length` tokens.

    With annealed attention this is the expected number. Padding is computed, so it counts as visible. With
    documents kept apart, the last block of each counts as if it were full. The arguments are those of
    `step_flops`.
    """
    everything = length**2 if within is None else within
    causal = (everything + length) / 2
    if is_autoregressive(settings, step):
        return causal
    if settings.block_size is not None:
        if within is not None:
            return within + length * settings.block_size
        return 2 * _block_causal_pairs(settings.block_size, length, prompt_length)
    first = (settings.switch_step or 1) if settings.kind == "autoregressive" else 1
    done = min(1.0, (step - first) / max(1, settings.attention_annealing_steps))
    if settings.attention_annealing_steps == 0:
        done = 1.0
    return causal + done * (everything - causal)


def _block_causal_pairs(size: int, length: int, prompt_length: float) -> float:
    """Return the visible pairs of one of the two copies: a query sees everything up to its block's end.

    A noisy query sees its own block noisy and earlier blocks clean; a clean query sees both clean.
    """
    full, rest = divmod(length - prompt_length, size)
    ends = [(prompt_length, prompt_length)]  # (tokens in the block, its end)
    ends += [(size, prompt_length + size * (i + 1)) for i in range(int(full))]
    ends.append((rest, length))
    return sum(tokens * end for tokens, end in ends)


def muon_flops(matrices: Iterable[Sequence[int]]) -> float:
    """Return the FLOPs of one update of these matrices by Muon, given their shapes.

    An iteration of Newton-Schulz on an m x n matrix, m <= n, takes X X^T, its square, and its product with X.
    """
    sides = (sorted(shape) for shape in matrices)
    return float(MUON_ITERATIONS * sum(4 * m * m * n + 2 * m**3 for m, n in sides))

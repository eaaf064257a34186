"""The floating-point operations of a training step, counted from the shapes of its matrix products.

A multiplication and an addition count as two. What is no product (norms, softmax, rotations, AdamW) is left
out, as everywhere in the field: it is below 1% of the operations of a model worth the question.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.config import Config, ObjectiveConfig

BACKWARD = 2  # the backward of a product is two products of its size


@dataclass(frozen=True)
class Flops:
    """FLOPs of a step over all ranks, forward and backward together.

    The sum of the first four is what the MFU is a share of (PaLM, arXiv 2204.02311, appendix B): work that
    the result needs. With `recomputed` it is what is executed, the base of the HFU.

    Attributes:
        projections: query, key, value and output projections.
        attention: queries with keys, and weights with values, for the pairs of positions that see each other.
        swiglu: the three projections of each SwiGLU.
        head: logits of the masked rows alone; the embedding is a look-up and costs nothing.
        recomputed: products that engine.activation_checkpointing runs again in the backward.
    """

    projections: float
    attention: float
    swiglu: float
    head: float
    recomputed: float

    @property
    def model(self) -> float:
        """FLOPs that the result needs."""
        return self.projections + self.attention + self.swiglu + self.head

    @property
    def executed(self) -> float:
        """FLOPs that are run."""
        return self.model + self.recomputed


def step_flops(
    config: Config, vocabulary_rows: int, masked_rows: float, step: int = 1, prompt_length: float = 0
) -> Flops:
    """Return the FLOPs of optimizer step `step`, over all ranks and micro-batches.

    Sequence parallelism divides the same products among the ranks of a group: their sum stays. Kernels that
    never write the attention weights (flash, flex) compute q k^T once more in the backward, a quarter of
    `attention`'s forward and backward; like every dense mask that computes pairs which do not see each other,
    that is their own affair and not counted.

    Args:
        config: the run.
        vocabulary_rows: rows of the output matrix (`Vocabulary.rows`).
        masked_rows: positions with logits, over the whole global batch; a mean will do.
        step: tells which objective it is, where the run switches; 1 is the first.
        prompt_length: mean tokens of a prompt, which is a block of its own in block diffusion.
    """
    model, sequences, length = config.model, config.train.global_batch_size, config.data.sequence_length
    inputs = sequences * length * copies(config.objective, step)
    pairs = sequences * visible_pairs(config.objective, step, length, prompt_length)
    width, kv_width = model.heads * model.head_width, (model.kv_heads or model.heads) * model.head_width
    forward = {
        "projections": 2 * inputs * model.hidden_size * (2 * width + 2 * kv_width) * model.layers,
        "attention": 2 * pairs * 2 * width * model.layers,
        "swiglu": 2 * inputs * 3 * model.hidden_size * model.intermediate_size * model.layers,
        "head": 2 * masked_rows * vocabulary_rows * model.hidden_size,
    }
    recomputed = 0.0
    if config.engine.activation_checkpointing == "blocks":
        # torch stops as soon as it has what the backward needs, before the down projection of each block; for
        # the same reason "swiglu" repeats no product at all.
        recomputed = forward["projections"] + forward["attention"] + forward["swiglu"] * 2 / 3
    return Flops(**{part: (1 + BACKWARD) * once for part, once in forward.items()}, recomputed=recomputed)


def is_autoregressive(settings: ObjectiveConfig, step: int) -> bool:
    """Say whether `step` (1 is the first) trains the autoregressive objective."""
    return settings.kind_at(step) == "autoregressive"


def copies(settings: ObjectiveConfig, step: int) -> int:
    """Return how many positions go through the blocks for each token: 2 with a clean copy, [xt ; x0]."""
    return 2 if settings.block_size is not None and not is_autoregressive(settings, step) else 1


def visible_pairs(settings: ObjectiveConfig, step: int, length: int, prompt_length: float = 0) -> float:
    """Return how many pairs of query and key see each other in one sequence of `length` tokens.

    Under an annealed attention it is the expected number. Padding counts as what it is computed as: seen.
    """
    causal = length * (length + 1) / 2
    if is_autoregressive(settings, step):
        return causal
    if settings.block_size is not None:
        return 2 * _block_causal_pairs(settings.block_size, length, prompt_length)
    first = (settings.switch_step or 1) if settings.kind == "autoregressive" else 1
    done = min(1.0, (step - first) / max(1, settings.attention_annealing_steps))
    if settings.attention_annealing_steps == 0:
        done = 1.0
    return causal + done * (length**2 - causal)


def _block_causal_pairs(size: int, length: int, prompt_length: float) -> float:
    """Return the pairs of one of the two copies: each query sees all up to the end of its own block.

    A noisy query sees its own block noisy and the ones before clean; a clean query sees both clean.
    """
    full, rest = divmod(length - prompt_length, size)
    ends = [(prompt_length, prompt_length)]  # (tokens of a block, where it ends)
    ends += [(size, prompt_length + size * (i + 1)) for i in range(int(full))]
    ends.append((rest, length))
    return sum(tokens * end for tokens, end in ends)

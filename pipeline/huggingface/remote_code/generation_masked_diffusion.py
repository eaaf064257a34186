"""`generate` of a masked diffusion language model."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.utils import ModelOutput

from .decoding_masked_diffusion import (
    GENERATION_NAMES,
    PADDING,
    UNFILLED,
    Decoded,
    Examples,
    HeadOutput,
    MaskedSequence,
    SamplingSettings,
    UserError,
    Values,
    Visibility,
    Vocabulary,
    chunk_rows,
    decode,
    memory_of,
    numbered,
    score_rows,
    stack_sequences,
)


@dataclass
class MaskedDiffusionOutput(ModelOutput):
    """The result of `generate`.

    Attributes:
        sequences: [B, L] int64, the inputs with what was filled in.
        order: [B, L] int64, the step at which each token was filled in, counted from 0; -1 elsewhere.
        steps: [B] int64, forward passes of each sequence.
    """

    sequences: Tensor | None = None
    order: Tensor | None = None
    steps: Tensor | None = None


class MaskedDiffusionGenerationMixin(GenerationMixin):
    """Fills in masked tokens, in place of the `generate` for causal models."""

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict_in_generate: bool = False,
        **settings: Any,
    ) -> Tensor | MaskedDiffusionOutput:
        """Continue prompts, or fill in the mask tokens of texts.

        Defaults are those of `generation_config`. The result depends neither on the batch nor on the cache.

        Args:
            inputs: [B, P], prompts; or texts with config.mask_token_id at the positions to fill in.
            generation_config: defaults in place of the model's own.
            input_ids: another name of `inputs`.
            attention_mask: [B, P], 0 at padding, on either side.
            return_dict_in_generate: return also the order of unmasking.
            **settings: any of these.

                max_new_tokens: tokens behind each prompt; None = up to the trained sequence length.
                policy: which positions are filled first: highest "confidence" or "margin", lowest
                    "entropy", in "random" order, or "left_to_right".
                tokens_per_step: tokens filled per step.
                steps: steps per sequence (per block, if any), instead of tokens_per_step.
                threshold: also fill every position with a confidence above this.
                block_length: fill blocks of this many tokens one after another. A model that was trained in
                    blocks always fills those.
                temperature: draw tokens from softmax(logits / temperature); 0 = take the likeliest.
                top_k: draw among the k likeliest tokens only; 0 = all.
                top_p: draw among the smallest set of likeliest tokens whose probabilities sum to p or more.
                remasking: schedule by which filled positions are masked again (ReMDM, arXiv 2503.00307):
                    "cap" or "rescale".
                eta: with remasking: highest probability ("cap"), or share of the highest possible one.
                use_cache: key-value cache for finished blocks, if the model was trained in blocks.
                seed: seed of the noise, a hash of the seed, the row, the position and the step.

        Returns:
            [B, P + N] int64, the prompts as they came and N new tokens, padded behind an end-of-sequence
            token; or the texts with their mask tokens filled in.

        Raises:
            ValueError: for a bad setting, or a prompt that leaves no room for an answer.
        """
        inputs = input_ids if inputs is None else inputs
        if inputs is None or inputs.ndim != 2:
            raise ValueError("give inputs: the token ids of the prompts, [B, P].")
        given = torch.ones_like(inputs, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        defaults = self.generation_config if generation_config is None else generation_config
        infills = bool((inputs[given] == self.config.mask_token_id).any())
        length = settings.pop("max_new_tokens", None if infills else defaults.max_new_tokens)
        sampling = _settings_of(settings, defaults)
        rows = [
            _with_masks(ids[row].tolist(), length, infills, self.config)
            for ids, row in zip(inputs, given, strict=True)
        ]
        config, device, numbers = self.config, inputs.device, range(len(inputs))
        if config.attention != "bidirectional" and sampling.block_size is not None:
            raise ValueError(
                f"block_length is {sampling.block_size}, but the model was trained in blocks or from left to "
                "right and must be decoded so: leave it out."
            )
        examples, masked = stack_sequences(rows, numbers, config.data_kind, config.pad_token_id, device)
        stop = None if infills else config.eos_token_id
        decoded = decode(_Model(self), examples, masked, sampling, _visibility(examples, config), stop)
        sequences, order = _placed(inputs, given, masked, decoded, stop, config.pad_token_id)
        if not return_dict_in_generate:
            return sequences
        return MaskedDiffusionOutput(sequences=sequences, order=order, steps=decoded.steps)


def _settings_of(given: dict[str, Any], defaults: GenerationConfig) -> SamplingSettings:
    """Return the sampler's settings; raise a TypeError for an unknown one, a ValueError for a bad one."""
    names = {GENERATION_NAMES.get(field.name, field.name): field.name for field in fields(SamplingSettings)}
    for name in given:
        if name not in names:
            raise TypeError(f"generate() has no setting {name}: it has max_new_tokens, {', '.join(names)}.")
    values = {name: given.get(name, getattr(defaults, name, None)) for name in names}
    if defaults.do_sample is False and "temperature" not in given:
        values["temperature"] = None  # transformers 4 has do_sample = False beside a temperature of 1
    for name, off in (("top_k", 0), ("top_p", 1.0)):
        if values[name] == off or (not values["temperature"] and name not in given):
            values[name] = None
    settings = SamplingSettings(**{names[n]: value for n, value in values.items() if value is not None})
    try:
        settings.check(lambda name: GENERATION_NAMES.get(name, name))
    except UserError as error:
        raise ValueError(str(error)) from None
    return settings


def _with_masks(ids: list[int], length: int | None, infills: bool, config: Any) -> MaskedSequence:
    """Return a text with its mask tokens, or a prompt with a masked answer of `length` tokens behind it."""
    mask, room = config.mask_token_id, config.max_position_embeddings - len(ids)
    if infills:
        sequence = MaskedSequence(ids, [token == mask for token in ids])
        if length is not None:
            raise ValueError(
                f"max_new_tokens is {length}, but mask tokens are to be filled in: leave it out."
            )
        if config.attention != "bidirectional":
            raise ValueError(
                "the inputs have mask tokens, but the model was trained in blocks or from left to right and "
                "does not see the text after them: give prompts without mask tokens."
            )
    else:
        count = room if length is None else length
        sequence = MaskedSequence.behind(ids, [mask] * count)
        if not 1 <= count <= room:
            raise ValueError(
                f"a prompt has {len(ids)} tokens; with an answer of {length or 'at least 1'} it does not fit "
                f"the trained sequence length {len(ids) + room}: shorten it, or change max_new_tokens."
            )
    if config.prediction == "shifted" and any(sequence.masked[:1]):
        raise ValueError(
            "a prompt is empty, or a text begins with a mask token, but this model predicts each token from "
            "the one before it: begin with at least one given token."
        )
    return sequence


def _visibility(examples: Examples, config: Any) -> Visibility:
    """Return which positions each position sees, as in training."""
    if config.attention == "bidirectional":
        return Visibility()
    if config.attention == "causal":
        return Visibility(torch.arange(examples.tokens.shape[1], device=examples.tokens.device)[None])
    answer = examples.answer
    if config.prediction == "shifted":  # the first token was always given
        answer = answer & ~examples.starts
    blocks = numbered(answer, config.block_size)
    return Visibility(torch.where(examples.roles == PADDING, blocks.max() + 1, blocks))


def _placed(
    inputs: Tensor, given: Tensor, masked: Tensor, decoded: Decoded, stop: int | None, pad: int
) -> tuple[Tensor, Tensor]:
    """Return tokens and order of decoded rows in the places of the inputs [B, P], with new ones behind."""
    added = 0 if stop is None else int(masked.sum(dim=1).max())
    sequences = nn.functional.pad(inputs, (0, added), value=pad)
    order = torch.full_like(sequences, UNFILLED)
    for row in range(len(inputs)):
        tokens, steps = decoded.tokens[row], decoded.order[row]
        if stop is None:
            place = given[row].nonzero().squeeze(1)
            tokens, steps = tokens[: len(place)], steps[: len(place)]
        else:
            tokens, steps = tokens[masked[row]], steps[masked[row]]
            ends = (tokens == stop).nonzero()
            length = int(ends[0]) + 1 if len(ends) else len(tokens)
            tokens, steps = tokens[:length], steps[:length]
            place = inputs.shape[1] + torch.arange(length, device=inputs.device)
        sequences[row, place], order[row, place] = tokens, steps
    return sequences, order


class _Model:
    """The model as the decoding knows one."""

    def __init__(self, network: Any) -> None:
        config = network.config
        self.shifted = config.prediction == "shifted"
        self.model = _Body(network.model)
        vocabulary = Vocabulary(config.vocab_size, config.num_tokens, config.mask_token_id)
        self.lm_head = _Head(network.lm_head, vocabulary)

    def outputs_of(self, rows: Tensor, length: int, visibility: Visibility) -> Tensor:
        """Return the rows of the flattened hidden states that predict `rows` [R]; position 0 is given."""
        return rows - 1 if self.shifted else rows


class _Body:
    """The body of the model: tokens to hidden states."""

    def __init__(self, model: Any) -> None:
        self.model, self.extend = model, model.extend

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None, visibility: Visibility) -> Tensor:
        return self.model(input_ids, attention_mask, visibility.blocks).last_hidden_state


class _Head:
    """The output matrix: hidden states to scores, a chunk of rows at a time."""

    def __init__(self, head: nn.Linear, vocabulary: Vocabulary) -> None:
        self.logits, self.weight, self.vocabulary = head, head.weight, vocabulary

    def scores(self, hidden: Tensor, needs: tuple[str, ...]) -> HeadOutput:
        """Return the scores of hidden [R, H]; there are no targets, so the losses say nothing."""
        targets = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        values = Values.empty(targets, needs)
        chunk = chunk_rows(len(self.weight), memory_of(hidden.device))
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            score_rows(self.logits(hidden[part]), targets[part, None], values.at(part))
        return HeadOutput(values.nll.sum(), *values)

"""A causal model of transformers that is a bigram language: its probabilities are known in closed form."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefg"
BEGIN = 0  # the id of the token before a text; the letters follow it
UNKNOWN = len(LETTERS) + 1


def bigram(seed: int = 0) -> Any:
    """Return log p(next | last), [last, next] float64: letters, and what stands before and for others."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (UNKNOWN + 1, UNKNOWN + 1))
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def surprise(table: Any, text: str, prompt: str = "") -> float:
    """Return -log p(text | prompt) of the language, in nats."""
    ids = [BEGIN, *(1 + LETTERS.find(c) if c in LETTERS else UNKNOWN for c in prompt + text)]
    pairs = list(itertools.pairwise(ids))[len(prompt) :]
    return -float(sum(table[last, following] for last, following in pairs))


def write_bigram(folder: Path, table: Any, limit: int = 64, **names: str) -> Path:
    """Write a Llama whose only layer adds nothing: what follows depends on the last token alone.

    Args:
        folder: to write.
        table: see `bigram`.
        limit: positions of the model.
        names: of special tokens in the tokenizer, by default bos_token.
    """
    size = len(table)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, max_position_embeddings=limit, tie_word_embeddings=False, rms_norm_eps=1e-12,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        # The norm makes sqrt(width) of a 1 among zeros.
        model.lm_head.weight[:, :size] = torch.tensor(table).T / config.hidden_size**0.5
    model.save_pretrained(folder)
    vocabulary = {"<s>": BEGIN, **{c: 1 + i for i, c in enumerate(LETTERS)}, "?": UNKNOWN}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    named = names or {"bos_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **named).save_pretrained(folder)
    return folder

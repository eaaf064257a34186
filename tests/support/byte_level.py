"""Small byte-level BPE tokenizers of Hugging Face's library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers


def train_byte_level(
    texts: Iterable[str], vocab_size: int, specials: Sequence[str], expression: str | None = None
) -> tokenizers.Tokenizer:
    """Return a trained tokenizer that takes texts apart by this expression, or by GPT-2's."""
    found = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=expression is None)
    if expression is not None:
        split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), split])
    found.pre_tokenizer = split
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts, trainer)
    return found

"""Decoding of masked diffusion language models: each step fills the positions that a policy ranks highest."""

from pipeline.base.errors import UserError
from pipeline.data.examples import PADDING, Examples
from pipeline.decoding.batching import MaskedSequence, stack_sequences
from pipeline.decoding.decoding import Decoded, decode
from pipeline.decoding.sampling import SamplingSettings
from pipeline.decoding.sequences import UNFILLED, numbered
from pipeline.huggingface.mapping import GENERATION_NAMES
from pipeline.model.attention import Remember, rotary_table, rotate
from pipeline.model.batch import HeadOutput, Visibility, Vocabulary
from pipeline.model.cache import KeyValueCache
from pipeline.model.masked_head import Values, chunk_rows, memory_of, score_rows

__all__ = [
    "GENERATION_NAMES",
    "PADDING",
    "UNFILLED",
    "Decoded",
    "Examples",
    "HeadOutput",
    "KeyValueCache",
    "MaskedSequence",
    "Remember",
    "SamplingSettings",
    "UserError",
    "Values",
    "Visibility",
    "Vocabulary",
    "chunk_rows",
    "decode",
    "memory_of",
    "numbered",
    "rotary_table",
    "rotate",
    "score_rows",
    "stack_sequences",
]

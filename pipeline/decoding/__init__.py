"""Decoding: complete prompts and fill masked spans with a trained model."""

from pipeline.decoding.completing import Completion, complete, infill
from pipeline.decoding.sampling import SamplingSettings

__all__ = ["Completion", "SamplingSettings", "complete", "infill"]

"""Decoding with a trained model: prompts to completions, masked spans to text."""

from pipeline.checkpoint.load_model import WEIGHTS_HELP, Loaded, Weights, load_model, takes_average
from pipeline.decoding.completing import Completion, complete, infill
from pipeline.decoding.settings import SamplingSettings

__all__ = [
    "WEIGHTS_HELP",
    "Completion",
    "Loaded",
    "SamplingSettings",
    "Weights",
    "complete",
    "infill",
    "load_model",
    "takes_average",
]

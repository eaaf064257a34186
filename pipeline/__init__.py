"""Pretraining of masked diffusion language models with progressive unmasking (PUMA)."""

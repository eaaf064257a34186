"""Decoding: complete prompts and fill masked spans with a trained model."""

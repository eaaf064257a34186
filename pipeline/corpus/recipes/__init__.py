"""Corpora that the project generates or prepares."""

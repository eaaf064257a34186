"""Corpora that the project makes or prepares itself."""

"""Defaults of the command line of an evaluation; importing this needs no torch."""

DRAWS = 128  # masks per sequence for its likelihood

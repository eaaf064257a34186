"""The tasks on which benchmarks/reproduce.py compares objectives, one module each."""

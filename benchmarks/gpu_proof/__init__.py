"""What a GPU makes of this project: one command, one report (`python -m benchmarks.gpu_proof`)."""

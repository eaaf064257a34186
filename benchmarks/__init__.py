"""What is claimed of cost, memory, quality and resume, one command each: `python -m benchmarks.NAME`."""

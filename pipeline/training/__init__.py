"""What surrounds the training loop: the start, the state, evaluations on schedule, checks before a start."""

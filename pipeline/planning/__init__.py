"""What a run will cost, from its settings alone, and whether it can start."""

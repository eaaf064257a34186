"""What a run will cost, from its settings alone: FLOPs, memory, communication, time. No torch is needed."""

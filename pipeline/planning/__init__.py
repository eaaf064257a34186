"""Plan what a run costs from its settings alone: memory, time, communication, disk space, price."""

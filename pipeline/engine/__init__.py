"""What executes the steps of a run: weights, gradients, optimizer, snapshots."""

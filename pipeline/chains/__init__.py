"""The chains of a run, from the slots that hold them to the stream of examples that they walk through."""

"""Offline: from a corpus to a tokenizer and an indexed dataset.

In the order of the data: sources, reading, records, partition (the cut into units), preprocess, pool, worker
(with encode), parts, merge.
"""

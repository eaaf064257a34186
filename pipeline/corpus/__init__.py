"""Offline: from a corpus to an indexed dataset (tools/preprocess_data.py)."""

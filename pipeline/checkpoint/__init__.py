"""Checkpoints: format, atomic asynchronous saves, retention, and resume at any world size.

``RUN/checkpoints/step_00000100/`` holds model/ (the engine's files), one slots_RRRRR.npz per rank (chains and
cursors), config.yaml, tokenizer/ and manifest.json with the size and hash of every file. It is written under
a temporary name and then renamed, so a folder with a manifest is complete unless it was damaged later.
"""

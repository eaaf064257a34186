"""Checkpoints: format, atomic asynchronous saves, retention, and resume at any world size.

``RUN/checkpoints/step_00000100/`` holds model/ (the engine's files), one slots_RRRRR.npz per rank (chains and
cursors), config.yaml, tokenizer/ and manifest.json with the size and hash of every file. It is written under
a temporary name and then renamed, so a folder with a manifest is complete unless it was damaged later.
"""

from pipeline.checkpoint.loading import check_continues, load, newest
from pipeline.checkpoint.lock import RunLock
from pipeline.checkpoint.manifest import FORMAT, Identity, Manifest, checkpoints, find
from pipeline.checkpoint.retention import clear
from pipeline.checkpoint.saving import Saver

__all__ = [
    "FORMAT",
    "Identity",
    "Manifest",
    "RunLock",
    "Saver",
    "check_continues",
    "checkpoints",
    "clear",
    "find",
    "load",
    "newest",
]

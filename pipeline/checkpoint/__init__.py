"""Checkpoints: what they are, how they come to exist all at once, and how a run goes on from one.

``RUN/checkpoints/step_00000100/`` holds model/ (the engine's own files), one slots_RRRRR.npz a rank (chains
and cursors), config.yaml, tokenizer/ and manifest.json with the size and hash of each. It is written under
another name and then renamed: a folder with a manifest is whole, or has been damaged since.
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

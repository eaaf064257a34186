"""A pickle that does something when it is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


class Command:
    """What a pickle can hold: a call that makes a folder when the pickle is read."""

    def __init__(self, made: Path) -> None:
        self.made = str(made)

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (self.made,)

"""Packages that only some programs need: the extras of pyproject.toml."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline.base.errors import UserError


@contextlib.contextmanager
def extra(name: str, purpose: str) -> Iterator[None]:
    """Import packages of an extra in here: one that is missing becomes a `UserError` with the remedy.

    Args:
        name: of the extra in pyproject.toml.
        purpose: what needs the packages, as a user knows it: an option or a setting.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise UserError(
            f"{purpose} needs {package}, which is not installed: pip install 'puma-pipeline[{name}]'."
        ) from None

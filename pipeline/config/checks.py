"""Reject invalid settings with a one-line error that names the key, the value and the remedy."""

from __future__ import annotations

from typing import Any

from pipeline.base.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise a `UserError` with `message` unless `condition` holds."""
    if not condition:
        raise UserError(message)


def require_not_negative(section: str, config: Any, *keys: str) -> None:
    """Raise a `UserError` for the first of `keys` that is below zero."""
    for key in keys:
        value = getattr(config, key)
        require(value >= 0, f"{section}.{key} is {value}: it must be 0 or more.")


def require_positive(section: str, config: Any, *keys: str) -> None:
    """Raise a `UserError` for the first of `keys` that is set but not above zero."""
    for key in keys:
        value = getattr(config, key)
        require(value is None or value > 0, f"{section}.{key} is {value}: it must be above 0.")

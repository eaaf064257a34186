"""Names for the parts of a step in a trace (``profiling.trace_steps``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch.profiler import record_function

P = ParamSpec("P")
T = TypeVar("T")

_tracing = False


def trace(on: bool) -> None:
    """Begin or end to name the calls of the functions that are `traced`."""
    global _tracing
    _tracing = on


def traced(name: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Name the calls of a function in a trace; without one, which is nearly always, that costs nothing."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not _tracing:
                return function(*args, **kwargs)
            with record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate

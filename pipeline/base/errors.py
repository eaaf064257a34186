"""Errors that end a program, and the exit codes of all programs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable

# Exit codes of every program; docs/reference/exit_codes.md says how a launcher handles them.
EXIT_DONE = 0
EXIT_FAILED = 1  # a bug, or training diverged: the same command would fail again
EXIT_BAD_INPUT = 2  # a setting, file or argument that the user can fix
EXIT_LOST_DATA = 3  # the dataset is written, without files that could not be read to their end
EXIT_REQUEUE = 75  # stopped early (EX_TEMPFAIL in sysexits.h): the same command resumes
EXIT_INTERRUPTED = 130  # ended at once by a second signal or Ctrl+C, without saving


class UserError(Exception):
    """An error that the user can fix; the message names the thing, its value and the remedy."""


class Failure(Exception):
    """An error that no setting caused, such as a full disk; the program exits with EXIT_FAILED."""


def why(error: OSError) -> str | None:
    """Return the reason of an error; that of a link to a missing folder would be ``File exists``."""
    path = str(error.filename)
    if isinstance(error, FileExistsError) and os.path.islink(path) and not os.path.exists(path):
        return f"a link to {os.readlink(path)}, which does not exist"
    return error.strerror


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the candidate closest to `name`, or an empty string."""
    names = list(candidates)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close and "." not in name:  # a bare key may lack its section: steps -> train.steps
        close = [c for c in names if c.rsplit(".", 1)[-1] == name][:1]
    return f" Did you mean {close[0]!r}?" if close else ""

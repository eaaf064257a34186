"""Files of torch.save, read without running the code that a file may name.

A pickle can name any function and its arguments, and Python's unpickler calls it. torch's restricted one
(``weights_only``) knows tensors, plain values and the classes that it is told, and refuses everything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from pipeline.base.errors import UserError


def read_tensors(
    path: Path, keys: Sequence[str] = (), device: torch.device | str = "cpu", mmap: bool = True
) -> Any:
    """Return what torch.save wrote.

    Args:
        path: the file.
        keys: those of a dictionary that it must hold.
        device: of the tensors.
        mmap: map the tensors from the file instead of reading them; only on the CPU.

    Raises:
        UserError: for a file that is damaged, or that names anything but tensors, plain values and the
            classes inside ``torch.serialization.safe_globals``.
    """
    try:
        content = torch.load(path, map_location=device, mmap=mmap, weights_only=True)
    except UnpicklingError as error:
        raise UserError(_refusal(path, str(error))) from None
    except (OSError, RuntimeError, ValueError, EOFError, LookupError, TypeError, AssertionError) as error:
        raise UserError(f"{path} is damaged ({_first_sentence(error)}): use an older checkpoint.") from None
    if keys and not (isinstance(content, dict) and all(key in content for key in keys)):
        raise UserError(f"{path} does not hold {', '.join(keys)}: it is of another program, or damaged.")
    return content


@contextmanager
def taking(path: Path) -> Iterator[None]:
    """Raise a `UserError` that names `path` where the block finds other content in it than it expects."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} does not fit this run ({reason}): use an older checkpoint.") from error


def _refusal(path: Path, message: str) -> str:
    """Return why a pickle is refused, from torch's message of many lines."""
    named = re.search(r"GLOBAL ([\w.<>]+)", message) or re.search(r"<.*?'?([\w.]+)'?>", message)
    if named is None:
        return f"{path} is not a file of tensors, or is damaged: use a checkpoint that this program wrote."
    return (
        f"{path} names {named[1]}, which could run commands and is in no checkpoint of this program: it is "
        "not read. Use a checkpoint from a source that you trust."
    )


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].split("\n")[0] or type(error).__name__

"""Shared command-line behaviour: one-line errors, exit codes, help."""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import io
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, NoReturn, TextIO, TypeVar

from pipeline.base.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Failure,
    UserError,
    nearest,
    why,
)
from pipeline.base.launch import place, says

T = TypeVar("T")

_BAD_PATH = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_OPTION = re.compile(r"--[a-z][\w-]*(=|$)", re.IGNORECASE)
_SAME_ERROR = 1.0  # seconds for the other ranks of a node to find an error, too
_ODD = (errno.ENAMETOOLONG, errno.ELOOP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the disk accepts no more data


class _HelpFormatter(argparse.HelpFormatter):
    """Show the default of an option unless it is empty, false or already in the help text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default in (None, False, [], argparse.SUPPRESS) or action.required
        if hidden or "%(default)" in (action.help or ""):
            return action.help
        several = isinstance(action.default, list)
        default = " ".join(map(str, action.default)).replace("%", "%%") if several else "%(default)s"
        return f"{action.help} (default: {default})"


class ToolParser(argparse.ArgumentParser):
    """An ArgumentParser that reports an error on one line and suggests the nearest known option."""

    def __init__(self, description: str) -> None:
        super().__init__(description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
        self._given: list[str] = []

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse arguments; report the first unknown option and suggest the nearest known one."""
        self._given = list(sys.argv[1:] if args is None else args)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0])
        return parsed

    def _refuse(self, given: str) -> NoReturn:
        option = given.split("=")[0]
        known = [name for action in self._actions for name in action.option_strings]
        fail(f"unknown option {option!r}.{nearest(option, known)} --help lists them all.")

    def error(self, message: str) -> NoReturn:
        """Print one line, without argparse's usage, and exit with EXIT_BAD_INPUT.

        A misspelt option, which argparse would call missing, is named as what it is.
        """
        if "required" in message:
            for given in self._given:
                if _OPTION.match(given) and given.split("=")[0] not in self._option_string_actions:
                    self._refuse(given)
        fail(message)


def option(name: str) -> str:
    """Return the command-line option for a setting: ``top_k`` -> ``--top-k``."""
    return f"--{name.replace('_', '-')}"


def chosen(cls: Callable[..., T], options: argparse.Namespace, **more: object) -> T:
    """Return a dataclass of the options that have the names of its fields, and of `more`."""
    names = {item.name for item in fields(cls)} - more.keys()  # type: ignore[arg-type]
    return cls(**{name: getattr(options, name) for name in names}, **more)


def require_at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Raise a `UserError` for the first of these options that is given and below 1."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"{option(name)} is {value}: it must be 1 or more.")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add --set, which overrides settings of the run's YAML."""
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="override settings of the YAML",
    )


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, such as optimizer.learning_rate=3e-4.")
    return text


def overrides(options: argparse.Namespace) -> list[str]:
    """Return the values of --set as arguments for `pipeline.config.load`."""
    return [f"--{setting}" for setting in options.set]


def fail(message: str, code: int = EXIT_BAD_INPUT) -> NoReturn:
    """Print ``error: message`` to stderr and exit with `code`.

    Usually all ranks fail with the same error, and the launcher ends the others after the first: the first
    one to fail on a node prints it.
    """
    here, text = place(), " ".join(message.split())
    if here.world_size == 1 or says(text):
        is_first_node = here.rank == here.local_rank
        text = text if is_first_node else f"rank {here.rank}: {text}"
        print(f"{in_red('error:', sys.stderr)} {text}", file=sys.stderr, flush=True)
        if here.world_size > 1:
            time.sleep(_SAME_ERROR)
    sys.exit(code)


def in_red(text: str, stream: TextIO) -> str:
    """Return `text` in red if `stream` shows colours, else unchanged."""
    return f"\033[1;31m{text}\033[0m" if in_colours(stream) else text


def in_colours(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal and NO_COLOR (https://no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def run(main: Callable[[Sequence[str] | None], int | None], of_ranks: bool = False) -> NoReturn:
    """Run a program's `main` and exit; a UserError or an unreadable path prints one line, exit code 2.

    Args:
        main: the program; it must close what it opens.
        of_ranks: the process is one of several ranks, and its exit code tells the launcher whether the run
            succeeded. Exit without interpreter shutdown: a torch.distributed thread that is still running
            could abort the process during shutdown and make a finished run count as failed. A full disk or
            a closed pipe behind stdout or stderr does not end the process either.
    """
    _open_standard_streams()
    if not of_ranks:
        _run(main)
    faulthandler.enable()  # print the Python stack when a library crashes
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        _run(main, of_ranks)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # full disk or closed pipe
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else EXIT_FAILED)


def _open_standard_streams() -> None:
    """Open standard streams that were closed before the process started, as empty ones.

    A file would otherwise get the number of one of them, and what libraries print would land in it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


class _Lossy(io.FileIO):
    """The file of a standard stream; drops output on a full disk or a closed pipe."""

    def write(self, content: Any) -> int:
        """Write `content`, or drop it."""
        with contextlib.suppress(OSError):
            return super().write(content) or len(content)
        return len(content)


def _lasting(stream: TextIO) -> TextIO:
    """Return a stream with the same target as `stream` that never raises: lost output must not end a run."""
    stream.flush()
    file = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(file, stream.encoding, stream.errors, line_buffering=True)


def _run(main: Callable[[Sequence[str] | None], int | None], of_ranks: bool = False) -> NoReturn:
    try:
        sys.exit(main(None) or EXIT_DONE)
    except UserError as error:
        fail(str(error))
    except Failure as error:
        fail(str(error), EXIT_FAILED)
    except _BAD_PATH as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {why(error)}. Check the path and its permissions.")
    except UnicodeEncodeError:
        for given in sys.argv[1:]:  # Python hides bytes that are no UTF-8 in half surrogate pairs
            if not given.isascii() and given.encode(errors="ignore").decode() != given:
                fail(f"argument {given!r} is not UTF-8: give it in UTF-8, or rename the file.")
        raise
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader (head, less) closed the pipe: not an error
        if of_ranks:  # standard streams never raise here, so this is another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_DONE)
    except OSError as error:
        if error.errno in _ODD and error.filename is not None:
            fail(f"{error.filename}: {error.strerror}. Check the path.")
        if error.errno not in _FULL:
            raise
        where = error.filename or "writing output"
        message = f"{where}: {error.strerror}. Free disk space and rerun the same command."
        fail(message, EXIT_FAILED)

"""What every command line of the project shares: one-line errors, exit codes, help."""

from __future__ import annotations

import argparse
import contextlib
import errno
import faulthandler
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TextIO

from pipeline.base.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Failure,
    UserError,
    nearest,
)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # a disk that takes no more


class _HelpFormatter(argparse.HelpFormatter):
    """Shows a default where there is one to know of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        hidden = action.default in (None, False, [], argparse.SUPPRESS) or action.required
        if hidden or "%(default)" in (action.help or ""):
            return action.help
        several = isinstance(action.default, list)
        default = " ".join(map(str, action.default)).replace("%", "%%") if several else "%(default)s"
        return f"{action.help} (default: {default})"


class ToolParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and name the nearest known option."""

    def __init__(self, description: str) -> None:
        super().__init__(
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Parse, and report the first unknown option together with the nearest known one."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = unknown[0].split("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            self.error(f"unknown option {option!r}.{nearest(option, known)} --help lists them all.")
        return parsed

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with EXIT_BAD_INPUT; argparse would print the usage too."""
        fail(message)


def option(name: str) -> str:
    """Return the option of a command line for the name of a setting."""
    return f"--{name.replace('_', '-')}"


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Give a tool that reads a run's YAML the option --set."""
    parser.add_argument(
        "--set",
        nargs="*",
        action="extend",
        default=[],
        type=_setting,
        metavar="KEY=VALUE",
        help="settings over the YAML's",
    )


def _setting(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text}: write KEY=VALUE, such as optimizer.learning_rate=3e-4.")
    return text


def overrides(options: argparse.Namespace) -> list[str]:
    """Return what --set holds as arguments of `pipeline.config.load`."""
    return [f"--{setting}" for setting in options.set]


def fail(message: str, code: int = EXIT_BAD_INPUT, alone: bool = False) -> NoReturn:
    """Print ``error: message`` to stderr and exit with `code`.

    Ranks mostly fail alike, and the first of each node speaks for the others: what only one node lacks is
    said there. An error that may be a rank's own is said by that rank (`alone`).
    """
    rank, local_rank = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK"))
    if alone or local_rank == "0":
        message = message if rank == "0" else f"rank {rank}: {message}"
        print(f"{in_red('error:', sys.stderr)} {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def in_red(text: str, stream: TextIO) -> str:
    """Return `text` in red for a terminal; as it is for a file, or under NO_COLOR (https://no-color.org)."""
    return f"\033[1;31m{text}\033[0m" if in_colours(stream) else text


def in_colours(stream: TextIO) -> bool:
    """Say whether `stream` shows colours: a terminal, and NO_COLOR is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def run(main: Callable[[Sequence[str] | None], int | None], of_ranks: bool = False) -> NoReturn:
    """Run a program's `main`; a UserError or an unreadable path becomes one line and exit code 2.

    Args:
        main: the program; what it opens it closes.
        of_ranks: it is one of several processes that exchange tensors. The launcher decides by its exit code,
            so the interpreter is not taken apart at the end: a thread of torch.distributed that is still at
            work would meet its ruins and abort the process, and a whole run would count as failed. Nor does
            a process end because nobody takes what it prints.
    """
    if not of_ranks:
        _run(main)
    faulthandler.enable()  # a crash in a library shows where Python was
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        _run(main, of_ranks)
    except SystemExit as end:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):  # a full disk, a reader that has gone
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else EXIT_FAILED)


class _Lossy(io.FileIO):
    """The file of a standard stream; what a full disk or a reader that has gone does not take is dropped."""

    def write(self, content: Any) -> int:
        """Write, or drop all of `content`."""
        with contextlib.suppress(OSError):
            return super().write(content) or len(content)
        return len(content)


def _lasting(stream: TextIO | None) -> TextIO:
    """Return a stream to where `stream` goes that never raises: what is printed is not worth the work."""
    if stream is None:  # it was closed before the start
        return open(os.devnull, "w", encoding="utf-8")
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
    except (
        FileNotFoundError,
        FileExistsError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        if error.filename is None:
            raise
        fail(f"{error.filename}: {error.strerror}. Check the path and its permissions.", alone=True)
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of a pipe (head, less) has gone: not an error
        if of_ranks:  # it was no standard stream: they drop what is not read
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_DONE)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        where = error.filename or "what was to be written"
        message = f"{where}: {error.strerror}. Make room, and start the same command again."
        fail(message, EXIT_FAILED, alone=True)

"""In a forked process: be ``python COMMAND``, and start the Python programs of that command by forks too."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import resource_tracker, util
from pathlib import Path
from typing import Any


def become(command: Sequence[str], environment: dict[str, str], files: Sequence[Path], folder: Path) -> None:
    """Be ``python COMMAND`` in a new session; `files` get what it prints to stdout and stderr."""
    for number, path in enumerate(files, start=1):
        with path.open("ab") as file:
            os.dup2(file.fileno(), number)
    os.setsid()
    os.chdir(folder)
    _run(command, environment)


class ForkedPopen(subprocess.Popen[Any]):
    """Starts ``python PROGRAM.py`` and ``python -m MODULE`` as forks of this process.

    Only in the main thread: another one converts snapshots while the main one talks to other ranks, and the
    workers of a conversion that is forked then die.
    """

    def __init__(
        self,
        args: Any,
        *more: Any,
        env: dict[str, str] | None = None,
        preexec_fn: Callable[[], object] | None = None,
        **options: Any,
    ) -> None:
        command = _of_python(args)
        if command:
            sys.stdout.flush()
            sys.stderr.flush()
            environment = dict(os.environ if env is None else env)
            preexec_fn = partial(_run_and_exit, command, environment, preexec_fn)
        super().__init__(args, *more, env=env, preexec_fn=preexec_fn, **options)


def _of_python(command: Any) -> list[str]:
    """Return a command's arguments of Python when it can be forked, else nothing."""
    if isinstance(command, str | bytes | os.PathLike) or command[0] != sys.executable:
        return []
    if threading.current_thread() is not threading.main_thread():
        return []
    arguments = [str(argument) for argument in command[1:]]
    if arguments[:1] == ["-u"]:
        del arguments[0]
    return arguments if arguments and (arguments[0] == "-m" or arguments[0].endswith(".py")) else []


def _run_and_exit(
    command: Sequence[str], environment: dict[str, str], before: Callable[[], object] | None
) -> None:
    """Do what the system does for a new program, and run it."""
    if before is not None:
        before()
    kept = resource_tracker.getfd()  # of multiprocessing, which would not notice that it is closed
    os.closerange(3, kept)
    os.closerange(kept + 1, os.sysconf("SC_OPEN_MAX"))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    gc.enable()  # subprocess has disabled it
    code = 1
    try:
        _run(command, environment)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        util._exit_function()  # type: ignore[attr-defined]  # as multiprocessing ends its processes
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _run(command: Sequence[str], environment: dict[str, str]) -> None:
    gc.freeze()  # what was imported before stays: collections need not look at it
    multiprocessing.set_start_method(None, force=True)  # that of a new program, not of this process
    os.environ.clear()
    os.environ.update(environment)
    # The parent's paths are here, too; an export's code has to come from this process's own copy.
    sys.path[:] = [path for path in sys.path if not Path(path, "transformers_modules").exists()]
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own would be between processes, and outlive this one's os._exit
    kind, program = command[:2] if command[0] in ("-m", "-c") else ("", command[0])
    sys.argv = [program, *command[2 if kind else 1 :]]
    if kind == "-c":
        exec(program, {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(program, run_name="__main__")

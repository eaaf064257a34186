"""Server process of `pipeline.evaluation.sandbox`: fork a locked-in process for each program.

Started as ``python -s -S -B sandbox_child.py LIMITS``; imports only the standard library. It reads one JSON
request per line from stdin and writes one JSON answer per line to stdout. `lock_in` applies the layers before
a program is compiled.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import json
import os
import platform
import random
import resource
import select
import signal
import socket
import struct
import sys
import time
import types
from collections.abc import Callable
from typing import Any

sys.path.pop(0)  # this folder: programs import only the standard library

# Modules a program can import: imported before it loses access to files. datetime needs `_strptime`, and the
# compiler `unicodedata`, for names that are not ASCII and for \N{...} in texts.
MODULES = """
    _strptime abc array bisect calendar cmath collections contextlib copy dataclasses datetime decimal enum
    fractions functools hashlib heapq inspect io itertools json math numbers operator pprint random re
    statistics string struct textwrap time types typing unicodedata weakref
""".split()
# Function names of TinyGSM and PAL; other programs must define the function to call last.
FUNCTIONS = ("simple_math_problem", "solution")
FUNCTION_TYPES = types.FunctionType, type(functools.cache(len))  # the latter of cached functions
LONGEST_RESULT = 4096  # bytes
LOCKED_IN = b"+"

# What computing needs: memory, time, and open descriptors. Calls that open, connect, start, signal, trace,
# load, mount or raise a limit are not listed, so the kernel refuses them.
SYSTEM_CALLS = {
    "x86_64": {
        "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11,
        "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24,
        "mremap": 25, "madvise": 28, "nanosleep": 35, "getpid": 39, "exit": 60, "gettimeofday": 96,
        "sigaltstack": 131, "gettid": 186, "time": 201, "futex": 202, "restart_syscall": 219,
        "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230, "exit_group": 231,
        "getrandom": 318,
    },
    "aarch64": {
        "close": 57, "lseek": 62, "read": 63, "write": 64, "fstat": 80, "exit": 93, "exit_group": 94,
        "futex": 98, "nanosleep": 101, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
        "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
        "rt_sigprocmask": 135, "rt_sigreturn": 139, "gettimeofday": 169, "getpid": 172, "gettid": 178,
        "brk": 214, "munmap": 215, "mremap": 216, "mmap": 222, "mprotect": 226, "madvise": 233,
        "getrandom": 278,
    },
}  # fmt: skip
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # linux/prctl.h
SECCOMP_MODE_FILTER, RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 2, 0x80000000, 0x00050000, 0x7FFF0000
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same numbers on every architecture
NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000 | 0x00020000  # user, network, IPC, mounts


class _Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


class Unprotected(Exception):
    """A required layer is missing: no program may run."""


def control(option: int, *arguments: object) -> None:
    """Call prctl; raise `Unprotected` on failure."""
    if LIBC.prctl(option, *arguments, *[0] * (4 - len(arguments))) != 0:
        raise Unprotected(f"prctl({option}) fails with {os.strerror(ctypes.get_errno())}")


def system_call_filter() -> _Filter:
    """Return the classic BPF program that allows only the calls of `SYSTEM_CALLS`."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSTEM_CALLS:
        raise Unprotected(f"it needs Linux on {' or '.join(SYSTEM_CALLS)}, not {sys.platform} on {machine}")
    allowed = sorted(SYSTEM_CALLS[machine].values())
    code = [
        (LOAD_WORD, 0, 0, 4),  # seccomp_data.arch: call numbers differ in another one (32 bits)
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        (RETURN, 0, 0, RET_KILL_PROCESS),
        (LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        *[(JUMP_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)],
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    return _Filter(len(code), b"".join(struct.pack("HBBI", *instruction) for instruction in code))


def leave_namespaces() -> bool:
    """Move this process to new network, mount, user and IPC namespaces; return whether that succeeds."""
    return bool(LIBC.unshare(NEW_NAMESPACES) == 0)


def landlock_version() -> int:
    """Return the ABI version of Landlock; 0 if the kernel has none."""
    return max(0, int(LIBC.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def landlock() -> None:
    """Drop access to files, TCP ports (ABI 4) and signals to others (ABI 6), if Landlock supports it."""
    abi = landlock_version()
    if abi == 0:
        return
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = LIBC.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0 or LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise Unprotected(f"Landlock fails with {os.strerror(ctypes.get_errno())}")


def lock_in(limits: dict[str, int], calls: _Filter) -> None:
    """Lock this process in permanently, and verify it; raise `Unprotected` on failure.

    Limits, no_new_privs and the seccomp filter are required; Linux 3.17 and later give them to unprivileged
    processes. Landlock, if available, refuses files and signals a second time.
    """
    hard = {
        resource.RLIMIT_CPU: limits["cpu_seconds"],
        resource.RLIMIT_AS: limits["memory"],
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in hard.items():
        resource.setrlimit(kind, (value, value))
    control(PR_SET_NO_NEW_PRIVS, 1)
    landlock()
    control(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(calls))
    for attempt in (lambda: os.open("/", os.O_RDONLY), socket.socket, lambda: os.kill(os.getppid(), 0)):
        try:
            attempt()
        except PermissionError:
            continue
        raise Unprotected("the kernel accepts the seccomp filter, but does not apply it")


def result_of(program: str) -> str:
    """Run a program and return the value of its function as text."""
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses looks for the meaning of annotations
    names = vars(module)
    exec(compile(program, "<program>", "exec", dont_inherit=True), names)  # not this file's __future__
    functions = [
        name
        for name, value in names.items()
        if isinstance(value, FUNCTION_TYPES) and value.__module__ == "program"  # no imported one
    ]
    known = [name for name in FUNCTIONS if name in functions]
    if not functions:
        raise NameError("the program defines no function")
    return str(names[(known or functions[-1:])[0]]())


def become(program: str, pipe: int, null: int, lock: Callable[[], None]) -> None:
    """Run one program in this process and exit: lock in, report it, run, write the result to `pipe`."""
    try:
        os.setsid()
        control(PR_SET_PDEATHSIG, signal.SIGKILL)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.dup2(pipe, 3)
        os.closerange(4, 256)
        lock()
    except BaseException as error:
        os.write(3, str(error).encode())
        os._exit(1)
    os.write(3, LOCKED_IN)  # anything after this byte may be written by the program
    random.seed(0)  # deterministic results
    try:
        result = {"value": result_of(program)}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"[:200]}
    os.write(3, json.dumps(result).encode()[:LONGEST_RESULT])
    os._exit(0)


def supervise(child: int, pipe: int, seconds: float) -> dict[str, str]:
    """Return the result of a program's process; kill it after `seconds` or too much output."""
    end, written, status = time.monotonic() + seconds, b"", None
    while len(written) < LONGEST_RESULT and select.select([pipe], [], [], max(0, end - time.monotonic()))[0]:
        piece = os.read(pipe, LONGEST_RESULT)
        written += piece
        if not piece:
            status = wait_until(end, child)
            break
    if status is None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if not written.startswith(LOCKED_IN):
        raise Unprotected(written.decode(errors="replace") or "the process ended while locking itself in")
    if status is None:
        much = len(written) >= LONGEST_RESULT
        return {"error": "a result of too many bytes" if much else f"still running after {seconds} s"}
    if os.WIFSIGNALED(status):
        return {"error": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    return read_result(written[len(LOCKED_IN) :])


def wait_until(end: float, child: int) -> int | None:
    """Return the exit status of a process; None if it still runs at time `end`."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= end:
            return None
        time.sleep(0.0005)


def read_result(written: bytes) -> dict[str, str]:
    """Parse the untrusted output of a program's process."""
    try:
        [(key, value)] = json.loads(written).items()
    except (ValueError, AttributeError, RecursionError):
        key = value = None
    if key in ("value", "error") and isinstance(value, str):
        return {key: value.encode(errors="replace").decode()}  # no file can hold half a surrogate pair
    return {"error": "ended without a result"}


def main() -> None:
    """Serve programs until stdin is closed."""
    limits = json.loads(sys.argv[1])
    for name in MODULES:
        importlib.import_module(name)
    null = os.open(os.devnull, os.O_RDWR)
    with open("/proc/self/statm") as file:  # size of this process: on some systems locales alone map 200 MB
        limits["memory"] += int(file.read().split()[0]) * resource.getpagesize()
    layers = ["limits", "no_new_privs", "seccomp"]
    layers += ["landlock"] if landlock_version() else []
    layers += ["namespaces"] if leave_namespaces() else []

    def run(program: str) -> dict[str, str]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            become(program, writing, null, lambda: lock_in(limits, calls))
        os.close(writing)
        try:
            return supervise(child, reading, limits["wall_seconds"])
        finally:
            os.close(reading)

    try:
        calls = system_call_filter()
        run("")
        answer({"layers": layers})
        for line in sys.stdin.buffer:
            answer(run(json.loads(line)))
    except Unprotected as error:
        answer({"unprotected": str(error)})


def answer(tree: dict[str, Any]) -> None:
    """Write one JSON line to stdout."""
    sys.stdout.buffer.write(json.dumps(tree).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

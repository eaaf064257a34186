"""The other side of `pipeline.evaluation.sandbox`: forks a locked-in process for each program it is given.

Started as ``python -s -S -B sandbox_child.py LIMITS``; imports the standard library only. It reads a JSON
request a line from stdin and answers each with a line on stdout. What is required is at the top of `lock_in`;
nothing of a program is compiled or run before.
"""

from __future__ import annotations

import ctypes
import errno
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
from collections.abc import Callable
from typing import Any

sys.path.pop(0)  # this folder: the programs' imports are those of the standard library

# What a program can import, for it cannot open a file any more; datetime imports `_strptime` by itself.
MODULES = """
    _strptime abc bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools
    heapq itertools json math numbers operator random re statistics string textwrap time typing
""".split()
# The one that TinyGSM's programs define, and PAL's; of others the last one that is defined is called.
FUNCTIONS = ("simple_math_problem", "solution")
LONGEST_RESULT = 4096  # bytes
LOCKED_IN = b"+"

# All that computing takes: memory, time, and the descriptors that are open. Whatever opens, connects, starts,
# signals, traces, loads, mounts or raises a limit is not here, and is refused whoever asks for it and how.
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
    """A required layer is missing: nothing may be run."""


def control(option: int, *arguments: object) -> None:
    """Call prctl; raise `Unprotected` where it fails."""
    if LIBC.prctl(option, *arguments, *[0] * (4 - len(arguments))) != 0:
        raise Unprotected(f"prctl({option}) fails with {os.strerror(ctypes.get_errno())}")


def system_call_filter() -> _Filter:
    """Return the program, in classic BPF, that lets the calls of `SYSTEM_CALLS` through and no others."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in SYSTEM_CALLS:
        raise Unprotected(f"its system calls are known on Linux for {', '.join(SYSTEM_CALLS)}, not {machine}")
    allowed = sorted(SYSTEM_CALLS[machine].values())
    code = [
        (LOAD_WORD, 0, 0, 4),  # seccomp_data.arch: the numbers of another one (32 bits) mean other calls
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[machine]),
        (RETURN, 0, 0, RET_KILL_PROCESS),
        (LOAD_WORD, 0, 0, 0),  # seccomp_data.nr
        *[(JUMP_EQUAL, len(allowed) - i, 0, number) for i, number in enumerate(allowed)],
        (RETURN, 0, 0, RET_ERRNO | errno.EPERM),
        (RETURN, 0, 0, RET_ALLOW),
    ]
    return _Filter(len(code), b"".join(struct.pack("HBBI", *instruction) for instruction in code))


def leave_namespaces() -> bool:
    """Take this process out of the machine's network, mounts and users; say whether the kernel allows it."""
    return bool(LIBC.unshare(NEW_NAMESPACES) == 0)


def landlock_version() -> int:
    """Return the version of Landlock's interface; 0 where the kernel has none."""
    return max(0, int(LIBC.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)))


def landlock() -> None:
    """Give up files, TCP ports (version 4) and signals to others (version 6), as far as there is Landlock."""
    abi = landlock_version()
    if abi == 0:
        return
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    rules = struct.pack("QQQ", files, 3, 3)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = LIBC.syscall(LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    if ruleset < 0 or LIBC.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) != 0:
        raise Unprotected(f"Landlock fails with {os.strerror(ctypes.get_errno())}")


def lock_in(limits: dict[str, int], calls: _Filter) -> None:
    """Lock this process in for good, and see for itself that it is; raise `Unprotected` where it is not.

    Required are the limits, no_new_privs and the filter of system calls, which every Linux since 3.17 gives
    an unprivileged process. Landlock, where there is one, refuses files and signals a second time.
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
        raise Unprotected("the kernel takes the filter of system calls and does not apply it")


def result_of(program: str) -> str:
    """Run a program and return what its function returns, as text."""
    names: dict[str, object] = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), names)
    functions = [name for name, value in names.items() if callable(value) and type(value) is type(result_of)]
    known = [name for name in FUNCTIONS if name in functions]
    if not functions:
        raise NameError("the program defines no function")
    return str(names[(known or functions[-1:])[0]]())  # type: ignore[operator]


def become(program: str, pipe: int, null: int, lock: Callable[[], None]) -> None:
    """Be the process of one program: lock in, say so, run it, write its result to `pipe`, end."""
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
    os.write(3, LOCKED_IN)  # whatever is written from here on may be the program's
    random.seed(0)  # the same result every time
    try:
        result = {"value": result_of(program)}
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}"[:200]}
    os.write(3, json.dumps(result).encode()[:LONGEST_RESULT])
    os._exit(0)


def supervise(child: int, pipe: int, seconds: float) -> dict[str, str]:
    """Read what a program's process writes until its end, or kill it at the end of its time."""
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
        raise Unprotected(written.decode(errors="replace") or "the process ends while it locks itself in")
    if status is None:
        much = len(written) >= LONGEST_RESULT
        return {"error": "a result of too many bytes" if much else f"still running after {seconds} s"}
    if os.WIFSIGNALED(status):
        return {"error": f"ended by {signal.Signals(os.WTERMSIG(status)).name}"}
    return read_result(written[len(LOCKED_IN) :])


def wait_until(end: float, child: int) -> int | None:
    """Return the status with which a process ends; None where it goes on until `end`."""
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() >= end:
            return None
        time.sleep(0.0005)


def read_result(written: bytes) -> dict[str, str]:
    """Return the result that a program's process wrote, which may be anything that the program likes."""
    try:
        [(key, value)] = json.loads(written).items()
    except (ValueError, AttributeError, RecursionError):
        key = value = None
    if key in ("value", "error") and isinstance(value, str):
        return {key: value}
    return {"error": "ended without a result"}


def main() -> None:
    """Serve programs until stdin is closed."""
    limits = json.loads(sys.argv[1])
    for name in MODULES:
        importlib.import_module(name)
    null = os.open(os.devnull, os.O_RDWR)
    with open("/proc/self/statm") as file:  # some systems map all their locales, which take 200 MB
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
    """Write a line to stdout."""
    sys.stdout.buffer.write(json.dumps(tree).encode() + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

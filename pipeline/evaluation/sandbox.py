"""Sandbox for programs written by a model: they can compute, and nothing else.

Each program runs in a new process. Before the program is compiled, the process drops all access except to its
memory, its CPU time and a pipe for the result. The layers, all unprivileged:

- limits (setrlimit) on CPU time, memory, file size and processes, and a supervisor that kills the process
  after a wall time;
- no_new_privs and a seccomp filter that allows only the system calls needed to compute. No allowed call opens
  a file, creates a socket, process or thread, sends a signal, traces or starts a program. So a program has no
  files, and can import only `sandbox_child.MODULES`;
- an empty environment, no descriptor but the pipe, its own session, stdout and stderr to /dev/null;
- if the kernel has them, Landlock without any permitted file or port, and empty network, user, IPC and mount
  namespaces. They refuse only what the other layers refuse, so results do not depend on them.

Limits and the filter are required: without them nothing runs. A program can forge its own result, but cannot
know the right one: references never enter the sandbox.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from pipeline.base.errors import Failure, UserError

CHILD = Path(__file__).with_name("sandbox_child.py")
COMMAND = [sys.executable, "-s", "-S", "-B", str(CHILD)]
REMEDY = (
    "Programs are not run unprotected. Use a Linux kernel with CONFIG_SECCOMP_FILTER (3.17 or later), in a "
    "container whose seccomp profile allows prctl, or choose a task that runs no programs."
)


@dataclass(frozen=True)
class Limits:
    """Limits of a program.

    Attributes:
        cpu_seconds: CPU time.
        wall_seconds: wall time, including sleep; larger than the CPU time to allow for a busy machine.
        memory: bytes of address space beyond the interpreter's.
    """

    cpu_seconds: int = 1
    wall_seconds: float = 10
    memory: int = 2**28


@dataclass(frozen=True)
class Outcome:
    """The outcome of a program: a value or an error.

    Attributes:
        value: the returned value as text; untrusted, the program may forge it.
        error: why there is no value.
    """

    value: str | None = None
    error: str | None = None


class Sandbox:
    """A pool of servers that each run one program at a time in a new process; thread-safe.

    Attributes:
        layers: the active layers.
    """

    def __init__(self, limits: Limits | None = None, servers: int = 1) -> None:
        """Start the servers; each first tests the layers with an empty program.

        Args:
            limits: limits of each program.
            servers: number of programs that run in parallel.

        Raises:
            UserError: when a required layer is missing.
        """
        options = dataclasses.asdict(limits or Limits())
        # A Python from a module system or conda may need its library path to start.
        environment = {k: v for k, v in os.environ.items() if k == "LD_LIBRARY_PATH"}
        environment |= {"PYTHONHASHSEED": "0", "TZ": "UTC"}
        self.servers = [
            subprocess.Popen(
                [*COMMAND, json.dumps(options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,
            )
            for _ in range(servers)
        ]
        self.idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        try:
            for server in self.servers:
                self.layers: list[str] = _answer(server)["layers"]
                self.idle.put(server)
        except BaseException:
            self.close()
            raise

    def run(self, program: str) -> Outcome:
        """Run a program and return the value of its function, called without arguments.

        The function is `simple_math_problem` or `solution` if defined, else the last function defined.

        Raises:
            UserError: when a layer cannot be applied to the process.
            Failure: when a server was killed.
        """
        server = self.idle.get()
        try:
            assert server.stdin is not None
            # ASCII JSON can also carry text with lone surrogates.
            server.stdin.write(json.dumps(program).encode() + b"\n")
            server.stdin.flush()
            return Outcome(**_answer(server))
        except BrokenPipeError:
            raise _gone(server) from None
        except BaseException:  # interrupted: the next program must not get this answer
            server.kill()
            raise
        finally:
            self.idle.put(server)

    def close(self) -> None:
        """Kill the servers and the programs that they run."""
        for server in self.servers:
            server.kill()
            server.communicate()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _answer(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line:
        raise _gone(server)
    answer: dict[str, Any] = json.loads(line)
    if "unprotected" in answer:
        raise UserError(f"no sandbox on this machine: {answer['unprotected']}. {REMEDY}")
    return answer


def _gone(server: subprocess.Popen[bytes]) -> Failure:
    return Failure(
        f"the sandbox server, process {server.pid}, was killed from outside: rerun the same command."
    )

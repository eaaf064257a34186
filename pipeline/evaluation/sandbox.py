"""Running programs that a model has written, where they can compute and nothing else.

A program runs in a process of its own, which gives up everything but its memory, its CPU time and a pipe for
its result before the first line of the program is even compiled. The layers, all unprivileged:

- limits (setrlimit) on CPU time, memory, file size and processes, and a supervisor that kills after
  a wall time;
- no_new_privs and a seccomp filter with a list of the system calls that computing takes. No call
  opens a file, makes a socket, a process or a thread, signals, traces or starts another program, so a program
  has no files at all, and imports only what `sandbox_child.MODULES` names;
- an empty environment, no descriptor but the pipe, its own session, stdout and stderr to /dev/null;
- where the kernel has them, Landlock without one permitted file or port, and empty network, user, IPC and
  mount namespaces. They refuse the same a second time, so that results do not depend on them.

Limits and the filter are required: without them nothing is run. A program can name any result as its own, but
it cannot know which one is right: the references never enter the sandbox.
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
    "Programs are not run unprotected. Take a Linux kernel with CONFIG_SECCOMP_FILTER (3.17 or later), in a "
    "container whose own seccomp profile allows prctl, or choose a task that runs no program."
)


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        cpu_seconds: CPU time.
        wall_seconds: time by the clock, sleep included; on a busy machine more than the CPU time.
        memory: bytes of address space beyond what the interpreter itself takes.
    """

    cpu_seconds: int = 1
    wall_seconds: float = 10
    memory: int = 2**28


@dataclass(frozen=True)
class Outcome:
    """How a program ended: with a value, or with an error.

    Attributes:
        value: what its function returned, as text, and what the program wants us to believe.
        error: why there is no value.
    """

    value: str | None = None
    error: str | None = None


class Sandbox:
    """Some servers that each run one program at a time, in a new process; safe to use from several threads.

    Attributes:
        layers: what protects this machine from the programs.
    """

    def __init__(self, limits: Limits | None = None, servers: int = 1) -> None:
        """Start the servers; each tries the layers on itself first.

        Args:
            limits: of each program.
            servers: programs that run at a time.

        Raises:
            UserError: when a required layer is missing.
        """
        options = dataclasses.asdict(limits or Limits())
        # A Python of a module system or conda may not start without its libraries' path.
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
        """Run a program and return what the function that it defines returns.

        That is `simple_math_problem` or `solution` where it defines one, and the last function else. It is
        called without arguments.

        Raises:
            UserError: when the process of the program cannot be locked in.
            Failure: when a server was killed.
        """
        server = self.idle.get()
        try:
            assert server.stdin is not None
            # JSON in ASCII, so that text with half a surrogate pair comes through too.
            server.stdin.write(json.dumps(program).encode() + b"\n")
            server.stdin.flush()
            return Outcome(**_answer(server))
        except BrokenPipeError:
            raise _gone(server) from None
        except BaseException:  # interrupted: what it answers belongs to nobody
            server.kill()
            raise
        finally:
            self.idle.put(server)

    def close(self) -> None:
        """End the servers, and with them what they run."""
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
        f"the sandbox's server, process {server.pid}, was ended from outside. Start again to go on."
    )

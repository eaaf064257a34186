"""Attempts to get out of the sandbox; each is judged by what the machine outside shows, not by its word.

All of them are made with every layer, and without Landlock and namespaces, which many clusters lack.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.cli import Failure, UserError
from pipeline.evaluation import sandbox
from pipeline.evaluation.sandbox import Limits, Outcome, Sandbox

SECRET = "the secret of the parent"
REQUIRED = ["limits", "no_new_privs", "seccomp"]
# Try everything in a list and keep what comes of it, so that one refusal does not save the rest.
TRY = """
import os, sys, time
found = []
def attempt(*actions):
    for action in actions:
        try:
            found.append(action())
        except BaseException as error:
            found.append(type(error).__name__)
def solution():
    return found
"""


def started(what: str, limits: Limits) -> Sandbox:
    """Return a sandbox on this kernel, or on one that `older_kernel.py` makes of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", SECRET)
        if what != "this":
            older = [sys.executable, "-s", "-S", "-B", str(Path(__file__).with_name("older_kernel.py")), what]
            patch.setattr(sandbox, "COMMAND", [*older, str(sandbox.CHILD)])
        return Sandbox(limits)


@pytest.fixture(scope="module", params=["this", "further"])
def box(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """Return a sandbox with all layers that this kernel has, and one with the required ones only."""
    with started(request.param, Limits(cpu_seconds=2, wall_seconds=8)) as one:
        yield one


class Watch:
    """What the machine shows of a sandbox's processes while it runs a program."""

    def __init__(self, box: Sandbox, program: str) -> None:
        server = psutil.Process(box.servers[0].pid)
        self.processes = self.threads = self.memory = 0
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(box.run, program)
            while not running.done():
                children = server.children(recursive=True)
                self.processes = max(self.processes, len(children))
                for child in children:
                    try:
                        self.threads = max(self.threads, child.num_threads())
                        self.memory = max(self.memory, child.memory_info().rss)
                    except psutil.NoSuchProcess:
                        pass
                time.sleep(0.005)
        self.outcome = running.result()
        self.left = server.children(recursive=True)


def test_the_layers(box: Sandbox, request: pytest.FixtureRequest) -> None:
    """The required ones are always there; an older kernel has nothing else."""
    assert box.layers[:3] == REQUIRED
    if "further" in request.node.name:
        assert box.layers == REQUIRED
    [server] = box.servers
    assert psutil.Process(server.pid).environ().keys() <= {"PYTHONHASHSEED", "TZ", "LD_LIBRARY_PATH"}


@pytest.mark.parametrize(
    ("program", "value"),
    [
        ("def simple_math_problem() -> int:\n    '''A question'''\n    return 3 * 4 + 0.5", "12.5"),
        ("from math import *\ndef helper(): return 2\ndef solution():\n    return comb(5, helper())", "10"),
        ("def solution():\n    return 1\ndef simple_math_problem():\n    return 2", "2"),
        ("def first(): return 1\ndef last(): return first() + 1", "2"),
        (
            "import datetime\ndef f(): return datetime.datetime.strptime('29.2.24', '%d.%m.%y').weekday()",
            "3",
        ),
        ("from fractions import Fraction\nclass A: x = 3\ndef f(): return Fraction(A.x, 4)", "3/4"),
    ],
)
def test_programs_that_compute(box: Sandbox, program: str, value: str) -> None:
    assert box.run(program) == Outcome(value=value)


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("x = 1", "NameError: the program defines no function"),
        ("def f(:", "SyntaxError: "),
        ("def f(): return 1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(x): return x", "TypeError: f() missing 1 required positional argument: 'x'"),
        ("def f(): raise SystemExit(0)", "SystemExit: 0"),
        ("import numpy", "ModuleNotFoundError: No module named 'numpy'"),
        ("def f(): return '\ud800'", "UnicodeEncodeError"),
        ("def f(): return f()", "RecursionError"),
        ("(" * 100000, ""),
        ("\0", ""),
        ("", "NameError"),
    ],
)
def test_programs_that_fail(box: Sandbox, program: str, error: str) -> None:
    outcome = box.run(program)
    assert outcome.value is None
    assert outcome.error is not None
    assert outcome.error.startswith(error)


def test_the_same_program_gives_the_same_result(box: Sandbox) -> None:
    program = "import random\ndef f(): return random.random(), hash('a'), random.sample(range(99), 9)"
    with started("this", Limits()) as other:
        assert len({box.run(program), box.run(program), other.run(program)}) == 1


def test_fork_bomb(box: Sandbox) -> None:
    forks = "[os.fork, os.forkpty, lambda: os.posix_spawn('/bin/true', ['true'], {})]"
    seen = Watch(box, f"{TRY}\nend = time.time() + 0.4\nwhile time.time() < end: attempt(*{forks})")
    assert (seen.processes, seen.left) == (1, [])


def test_thread_bomb(box: Sandbox) -> None:
    start = "lambda: _thread.start_new_thread(time.sleep, (1,))"
    seen = Watch(
        box, f"{TRY}\nimport _thread\nend = time.time() + 0.4\nwhile time.time() < end: attempt({start})"
    )
    assert (seen.processes, seen.threads) == (1, 1)


def said(outcome: Outcome) -> str:
    """Return all that came out of a program; it has to have come to its end."""
    assert outcome.value is not None, outcome.error
    return outcome.value


def test_reading_system_files(box: Sandbox) -> None:
    out = said(box.run(f"{TRY}\nattempt(lambda: open('/etc/passwd').read(), lambda: os.listdir('/etc'))"))
    assert Path("/etc/passwd").read_text()[:10] not in out
    assert "hostname" not in out


def test_reading_a_file_of_the_parent(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(SECRET)
    (tmp_path / "link").symlink_to("target_of_the_link")
    (tmp_path / "size").write_bytes(b"x" * 48611)
    out = said(
        box.run(
            f"{TRY}\nos.chdir and attempt(lambda: open('{tmp_path}/file').read(),"
            f" lambda: os.readlink('{tmp_path}/link'), lambda: os.stat('{tmp_path}/size'),"
            f" lambda: os.read(os.open('{tmp_path}/file', os.O_PATH), 99), lambda: os.listdir('{tmp_path}'))"
        )
    )
    assert not any(each in out for each in (SECRET, "target_of", "48611"))


def test_writing_outside(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    box.run(
        f"{TRY}\nattempt(lambda: open('{tmp_path}/new', 'w'), lambda: open('{tmp_path}/kept', 'w'),"
        f" lambda: os.mkdir('{tmp_path}/folder'), lambda: os.remove('{tmp_path}/kept'),"
        f" lambda: os.rename('{tmp_path}/kept', '{tmp_path}/moved'),"
        f" lambda: os.truncate('{tmp_path}/kept', 0),"
        f" lambda: os.chmod('{tmp_path}/kept', 0), lambda: os.mkfifo('{tmp_path}/fifo'))"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "kept"
    assert (tmp_path / "kept").stat().st_mode & 0o777


@pytest.mark.parametrize("make", ["symlink", "link"])
def test_links_out_of_its_folder(box: Sandbox, tmp_path: Path, make: str) -> None:
    (tmp_path / "target").write_text(SECRET)
    names = [f"{folder}/sandbox-link-{os.getpid()}" for folder in (tmp_path, "/tmp", "/dev/shm", ".")]
    steps = [
        f"lambda: os.{make}('{tmp_path}/target', '{n}'), lambda: open('{n}').read(), lambda: open('{n}', 'w')"
        for n in names
    ]
    out = said(box.run(f"{TRY}\nattempt({', '.join(steps)})"))
    assert SECRET not in out
    assert (tmp_path / "target").read_text() == SECRET
    assert (tmp_path / "target").stat().st_nlink == 1
    assert not any(Path(name).is_symlink() for name in names)


def test_relative_paths_after_chdir(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(SECRET)
    folder = psutil.Process(box.servers[0].pid).cwd()
    relative = os.path.relpath(tmp_path, folder)
    out = said(
        box.run(
            f"{TRY}\nattempt(lambda: os.chdir('{tmp_path}'), lambda: open('file').read(), os.getcwd,"
            f" lambda: open('{relative}/file').read(), lambda: open('{relative}/new', 'w'))"
        )
    )
    assert SECRET not in out
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def nobody_calls(server: socket.socket) -> bool:
    """Say whether a listening or bound socket has met with nothing."""
    server.settimeout(0.05)
    try:
        server.recv(99) if server.type == socket.SOCK_DGRAM else server.accept()
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("kind", ["tcp", "udp", "unix", "abstract"])
def test_sockets(box: Sandbox, tmp_path: Path, kind: str) -> None:
    family = socket.AF_INET if kind in ("tcp", "udp") else socket.AF_UNIX
    place = {"unix": f"{tmp_path}/s", "abstract": f"\0sandbox-{os.getpid()}"}.get(kind, ("127.0.0.1", 0))
    with socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM) as server:
        server.bind(place)
        if kind != "udp":
            server.listen()
        make = f"socket.socket({int(family)}, {int(server.type)})"
        knock = f"one = {make}\n        one.connect({server.getsockname()!r})\n        one.send(b'x')"
        program = f"import socket\ndef solution():\n    try:\n        {knock}\n    finally:\n        pass"
        exec(program, here := {})
        here["solution"]()  # the attempt works where nothing forbids it
        assert not nobody_calls(server)
        if kind != "udp":
            with pytest.raises(TimeoutError):
                server.accept()
        assert box.run(program).value is None
        assert nobody_calls(server)


def test_dns(box: Sandbox) -> None:
    """Neither the resolver nor a query of its own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        query = "b'\\x12\\x34\\1\\0\\0\\1\\0\\0\\0\\0\\0\\0\\7example\\3com\\0\\0\\1\\0\\1'"
        send = f"socket.socket(2, 2).sendto({query}, {server.getsockname()!r})"
        out = said(
            box.run(
                f"{TRY}\nimport socket\nattempt(lambda: {send}, lambda: socket.getaddrinfo('localhost', 80))"
            )
        )
        assert nobody_calls(server)
    assert "127.0.0.1" not in out


@pytest.mark.parametrize(
    ("program", "least"),
    [
        ("while True: pass", 0.9),
        ("import time\nwhile True: time.sleep(99)", 1.1),
        ("import os\nos.close(3)\nwhile True: pass", 0.9),
        ("import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
         "    except BaseException: pass\nwhile True:\n    try:\n        while True: pass\n"
         "    except BaseException: pass", 0.9),
    ],
    ids=["infinite loop", "sleep for ever", "closed result", "signals ignored"],
)  # fmt: skip
def test_programs_without_end(program: str, least: float) -> None:
    with started("this", Limits(cpu_seconds=1, wall_seconds=1.2)) as box:
        began = time.monotonic()
        outcome = box.run(program)
        assert least < time.monotonic() - began < 4
        assert outcome in (
            Outcome(error="ended by SIGKILL"),
            Outcome(error="still running after 1.2 s"),
        )
        assert psutil.Process(box.servers[0].pid).children() == []
        assert box.run("def f(): return 1") == Outcome(value="1")


def test_memory(box: Sandbox) -> None:
    hoard = "held = []\ndef solution():\n    try:\n        while True: held.append(bytearray(2**22))"
    seen = Watch(
        box, f"{hoard}\n    except MemoryError:\n        import time; time.sleep(0.3); return len(held)"
    )
    assert int(said(seen.outcome)) > 20
    assert 2**26 < seen.memory < 2**28 + 2**26


def test_output_goes_nowhere(box: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    flood = "for fd in (0, 1, 2): attempt(lambda: os.write(fd, b'x' * 2**20))"
    box.run(f"{TRY}\nfor i in range(200):\n    print('x' * 2**20); {flood}")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "program", ["import os\nwhile True: os.write(3, b'x' * 2**20)", "def f(): return 'x' * 2**24"]
)
def test_large_results_are_cut_off(box: Sandbox, program: str) -> None:
    outcome = box.run(program)
    assert outcome.value is None
    assert len(outcome.error or "") < 250


def test_large_files(box: Sandbox, tmp_path: Path) -> None:
    names = [f"{folder}/sandbox-large-{os.getpid()}" for folder in (tmp_path, "/tmp", "/dev/shm", ".")]
    writes = ", ".join(f"lambda: open('{name}', 'wb').write(bytes(2**26))" for name in names)
    seen = Watch(box, f"{TRY}\nattempt({writes}, lambda: os.write(os.memfd_create('a'), bytes(2**26)))")
    said(seen.outcome)
    assert not any(Path(name).exists() for name in names)


def test_signals_to_others(box: Sandbox) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        server = box.servers[0].pid
        kills = [f"lambda: os.kill({pid}, {int(signal.SIGUSR1)})" for pid in (os.getpid(), -os.getpgrp())]
        kills += [
            f"lambda: os.kill({server}, 9)",
            "lambda: os.kill(os.getppid(), 9)",
            "lambda: os.killpg(0, 9)",
        ]
        said(box.run(f"{TRY}\nattempt({', '.join(kills)})"))
        time.sleep(0.05)
        assert received == []
        assert psutil.pid_exists(server)
        assert box.run("def f(): return 1") == Outcome(value="1")
        os.kill(os.getpid(), signal.SIGUSR1)
        assert received == [signal.SIGUSR1]  # it would have been seen
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_secrets_of_the_environment(box: Sandbox) -> None:
    out = said(
        box.run(
            f"{TRY}\nimport ctypes\nattempt(lambda: dict(os.environ),"
            " lambda: open('/proc/self/environ').read(),"
            " lambda: open(f'/proc/{os.getppid()}/environ').read(),"
            " lambda: ctypes.CDLL(None).getenv(b'SECRET') and 'the secret is there')"
        )
    )
    assert "the secret" not in out
    assert "PATH'" not in out.replace("LD_LIBRARY_PATH'", "")


def test_starting_other_programs(box: Sandbox, tmp_path: Path) -> None:
    touch = f"touch {tmp_path}/touched"
    starts = [f"lambda: os.system('{touch}')", f"lambda: os.popen('{touch}')",
              f"lambda: os.posix_spawn('/bin/sh', ['sh', '-c', '{touch}'], {{}})",
              f"lambda: os.spawnv(0, '/bin/sh', ['sh', '-c', '{touch}'])",
              f"lambda: __import__('subprocess').run('{touch}', shell=True)",
              f"lambda: os.execv('/bin/sh', ['sh', '-c', '{touch}'])"]  # fmt: skip
    assert "ModuleNotFoundError" in said(box.run(f"{TRY}\nattempt({', '.join(starts)})"))
    assert list(tmp_path.iterdir()) == []


def test_raw_system_calls(box: Sandbox, tmp_path: Path) -> None:
    """Through libc: open, fork, execve, undoing the filter and the limits."""
    path, flags = f"{tmp_path}/raw", os.O_CREAT | os.O_WRONLY
    numbers = {"x86_64": (257, 57, 59, 160), "aarch64": (56, 220, 221, 164)}
    openat, fork, execve, setrlimit = numbers[platform.machine()]
    seen = Watch(
        box,
        f"""{TRY}
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
many = (ctypes.c_ulong * 2)(-1, -1)
words = (ctypes.c_char_p * 4)(b'sh', b'-c', b'touch {path}', None)
attempt(
    lambda: libc.prctl(22, 0, 0, 0, 0), lambda: libc.prctl(22, 2, None, 0, 0),
    lambda: libc.syscall({setrlimit}, 9, ctypes.byref(many)),
    lambda: libc.syscall({openat}, -100, b'{path}', {flags}, 0o644), lambda: libc.creat(b'{path}', 0o644),
    lambda: libc.syscall({fork}, 17, 0, 0, 0, 0) == 0 and time.sleep(1),
    lambda: libc.syscall({execve}, b'/bin/sh', words, None),
    lambda: libc.system(b'touch {path}'),
    lambda: libc.syscall({openat} | 0x40000000, -100, b'{path}', {flags}, 0o644),
)
time.sleep(0.2)
""",
    )
    said(seen.outcome)
    assert list(tmp_path.iterdir()) == []
    assert seen.processes == 1


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the 32-bit gate of x86")
def test_system_calls_by_32_bit_numbers(box: Sandbox, tmp_path: Path) -> None:
    """Machine code makes a folder through the gate with other numbers: 39 is getpid, and mkdir there."""
    program = f"""
import ctypes
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(ctypes.c_void_p(0x10000000), 4096, 7, 0x32, -1, 0)
path = b'{tmp_path}/gate'
ctypes.memmove(page + 256, path + b'\\0', len(path) + 1)
code = b'\\x53\\xb8\\x27\\0\\0\\0\\xbb\\0\\1\\0\\x10\\xb9\\xff\\1\\0\\0\\xcd\\x80\\x5b\\xc3'
ctypes.memmove(page, code, 20)
ctypes.CFUNCTYPE(ctypes.c_int)(page)()
def solution(): return 1
"""
    assert box.run(program) == Outcome(error="ended by SIGSYS")
    assert list(tmp_path.iterdir()) == []


def test_memory_of_the_parent(box: Sandbox) -> None:
    canary = ctypes.create_string_buffer(SECRET.encode())
    address, pid = ctypes.addressof(canary), os.getpid()
    calls = {"x86_64": (101, 310, 311), "aarch64": (117, 270, 271)}[platform.machine()]
    trace, read, write = calls
    out = said(
        box.run(
            f"""{TRY}
import ctypes
libc = ctypes.CDLL(None)
class Part(ctypes.Structure):
    _fields_ = (('base', ctypes.c_void_p), ('length', ctypes.c_size_t))
copy = ctypes.create_string_buffer(b'overwritten', 24)
mine, theirs = Part(ctypes.addressof(copy), 24), Part({address}, 24)
vm = [{pid}, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0]
attempt(lambda: libc.ptrace(16, {pid}, None, None), lambda: libc.syscall({trace}, 0x4206, {pid}, None, None),
    lambda: os.pread(os.open('/proc/{pid}/mem', os.O_RDONLY), 24, {address}),
    lambda: os.pwrite(os.open('/proc/{pid}/mem', os.O_RDWR), bytes(24), {address}),
    lambda: libc.syscall({read}, *vm), lambda: libc.syscall({write}, *vm), lambda: copy.raw)
"""
        )
    )
    assert SECRET not in out
    assert canary.value == SECRET.encode()
    assert "TracerPid:\t0\n" in Path("/proc/self/status").read_text()


def test_inherited_descriptors(tmp_path: Path) -> None:
    with (tmp_path / "open").open("w+b", buffering=0) as file:
        os.set_inheritable(file.fileno(), True)
        reading, writing = os.pipe()
        os.set_inheritable(writing, True)
        os.set_blocking(reading, False)
        with started("this", Limits(wall_seconds=8)) as box:
            writes = "attempt(*[lambda fd=fd: os.write(fd, b'x') for fd in range(4096) if fd != 3])"
            out = said(box.run(f"{TRY}\n{writes}\nfound = [found.count(1), found.count('OSError')]"))
            assert out == "[3, 4092]"  # /dev/null, and nothing else but the result
            with pytest.raises(BlockingIOError):
                os.read(reading, 1)
        assert (tmp_path / "open").read_bytes() == b""
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize(
    "write",
    [
        b'{"value": "42"}{"value": "43"}',
        b'{"value": "42", "error": "no"}',
        b'{"value": 42}',
        b'{"unprotected": "stop the evaluation"}',
        b"[" * 4000,
        b"\x80\x04K*.",
        b'{"layers": []}\n{"value": "42"}\n',
        b"\n",
        b"",
    ],
)
def test_forged_results(box: Sandbox, write: bytes) -> None:
    """Junk in the result's place is an error of this program, and touches no other one."""
    outcome = box.run(f"import os\nos.write(3, {write!r})\nos._exit(0)")
    assert outcome == Outcome(error="ended without a result")
    assert box.run("def f(): return 7") == Outcome(value="7")


def test_changed_modules_stay_in_their_process(box: Sandbox) -> None:
    changes = (
        "import json, sys, builtins, os\nmain = sys.modules['__main__']\nmain.result_of = lambda p: '42'\n"
        "main.supervise = main.read_result = lambda *a: {'value': '42'}\nbuiltins.str = lambda x: '42'\n"
        "json.loads = lambda x: {'value': '42'}\nos.waitpid = lambda *a: (1, 0)\ndef f(): return 1"
    )
    box.run(changes)
    assert box.run("def f(): return 7") == Outcome(value="7")
    assert box.run("def f(): return 1 / 0").error == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("what", "reason"),
    [("seccomp", "Invalid argument"), ("pretence", "does not apply it")],
)
def test_nothing_runs_unprotected(what: str, reason: str) -> None:
    """Without the filter of system calls there is no sandbox, but one error with the remedy."""
    with pytest.raises(UserError, match=rf"no sandbox on this machine: .*{reason}.*CONFIG_SECCOMP_FILTER"):
        started(what, Limits())


def test_an_interrupted_program_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value never comes out as that of the next program."""

    def interrupt(server: object) -> None:
        raise KeyboardInterrupt

    with started("this", Limits()) as box:
        with monkeypatch.context() as patch:
            patch.setattr(sandbox, "_answer", interrupt)
            with pytest.raises(KeyboardInterrupt):
                box.run("def f(): return 'stale'")
        with pytest.raises(Failure):
            box.run("def f(): return 1")


def test_a_killed_server_is_reported() -> None:
    with started("this", Limits()) as box:
        box.servers[0].kill()
        box.servers[0].wait()
        with pytest.raises(Failure, match="was ended from outside"):
            box.run("def f(): return 1")


def test_programs_end_with_the_sandbox() -> None:
    box = started("this", Limits())
    running = threading.Thread(target=functools.partial(_ignore_failure, box))
    running.start()
    server = psutil.Process(box.servers[0].pid)
    while not (children := server.children()):
        time.sleep(0.01)
    box.servers[0].kill()
    assert psutil.wait_procs(children, timeout=5)[1] == []
    running.join()
    box.close()


def _ignore_failure(box: Sandbox) -> None:
    with pytest.raises(Failure):
        box.run("import time\ntime.sleep(60)")


def test_several_servers_answer_in_order() -> None:
    programs = [f"def f(): return {i}" for i in range(60)]
    with Sandbox(servers=3) as box, ThreadPoolExecutor(3) as pool:
        assert [one.value for one in pool.map(box.run, programs)] == [str(i) for i in range(60)]

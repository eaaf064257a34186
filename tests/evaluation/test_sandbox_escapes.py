"""Attempts to escape the sandbox, judged by their effects outside, not by what the program reports.

Each runs with all layers, and again without Landlock and namespaces, which many clusters lack.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import socket
import time
from pathlib import Path

import psutil
import pytest

from pipeline.evaluation.sandbox import Limits, Outcome, Sandbox
from support.sandboxes import SECRET, TRY, Watch, said, started

pytestmark = pytest.mark.slow


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
    """Return whether a listening or bound socket receives nothing."""
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
        here["solution"]()  # the attempt works outside the sandbox
        assert not nobody_calls(server)
        if kind != "udp":
            with pytest.raises(TimeoutError):
                server.accept()
        assert box.run(program).value is None
        assert nobody_calls(server)


def test_dns(box: Sandbox) -> None:
    """Neither the resolver nor a raw DNS query works."""
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
        assert received == [signal.SIGUSR1]  # the handler works
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
    """Through libc: open, fork, execve, removing the filter and the limits."""
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
    """Machine code calls the 32-bit gate, where number 39 is mkdir instead of getpid."""
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
            assert out == "[3, 4092]"  # 0 to 2 are /dev/null, the others are closed
            with pytest.raises(BlockingIOError):
                os.read(reading, 1)
        assert (tmp_path / "open").read_bytes() == b""
        os.close(reading)
        os.close(writing)

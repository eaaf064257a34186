"""Exit codes, error lines and help of programs."""

from __future__ import annotations

import importlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.base import cli, errors, files
from pipeline.base.cpus import usable_cpus
from pipeline.config import build_parser
from support.programs import ROOT, free_ports, run_here

pytestmark = pytest.mark.slow

# os.abort at exit simulates a torch.distributed thread that aborts during interpreter shutdown.
ABORTS_IN_TEARDOWN = """
import atexit, os, sys
from pipeline.base import cli, errors
from pipeline.base import files

atexit.register(os.abort)


def main(_):
    print("the last line", end="")
    {ending}


cli.run(main, of_ranks={of_ranks})
"""


def end(ending: str, of_ranks: bool) -> subprocess.CompletedProcess[str]:
    """Run the program above."""
    program = ABORTS_IN_TEARDOWN.format(ending=ending, of_ranks=of_ranks)
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("ending", "code", "message"),
    [
        ("return 0", 0, ""),
        ("return errors.EXIT_REQUEUE", 75, ""),
        ("raise errors.UserError('no such key')", 2, "error: no such key\n"),
        ("raise errors.Failure('the disk is full')", 1, "error: the disk is full\n"),
    ],
)
def test_a_rank_ends_with_its_own_exit_code(ending: str, code: int, message: str) -> None:
    """An abort during interpreter shutdown changes neither exit code nor output."""
    result = end(ending, of_ranks=True)
    assert (result.returncode, result.stdout, result.stderr) == (code, "the last line", message)


def test_the_stand_in_aborts_a_program_that_is_taken_apart() -> None:
    """Without `of_ranks` the program aborts, so the test above can fail."""
    assert end("return 0", of_ranks=False).returncode == -6


def test_a_crash_of_a_rank_shows_where_python_was() -> None:
    """A segmentation fault in a library prints the Python stack on stderr."""
    result = end("os.kill(os.getpid(), 11)", of_ranks=True)
    assert result.returncode == -11
    assert "Segmentation fault" in result.stderr
    assert "in main" in result.stderr


def test_a_rank_survives_a_closed_output_pipe() -> None:
    """A dead `tee`, a full disk or a closed stdout must not end the run or change its exit code."""
    ending = "[print('more', flush=True) for _ in range(3)]; print('error', file=sys.stderr); return 75"
    program = ABORTS_IN_TEARDOWN.format(ending=ending, of_ranks=True)
    reader, writer = os.pipe()
    os.close(reader)
    outputs = [writer] + [os.open("/dev/full", os.O_WRONLY)] * Path("/dev/full").exists()
    for output in outputs:
        ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=output, stderr=output)
        assert ended.returncode == errors.EXIT_REQUEUE
        os.close(output)
    closed = subprocess.run(["sh", "-c", '"$0" -c "$1" >&-', sys.executable, program], cwd=ROOT)
    assert closed.returncode == errors.EXIT_REQUEUE


WRITES_A_FILE = """
import os, sys
from pipeline.base import cli

def main(_):
    with open(sys.argv[1], "w") as file:
        print("said", len(sys.stdin.read()))
        print("complained", file=sys.stderr)
        os.write(1, b"noise of a library")
        file.write("content")

cli.run(main)
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_empty(closed: str, tmp_path: Path) -> None:
    """Python has None for them, and the first file would get their number."""
    command = ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, WRITES_A_FILE, str(tmp_path / "x")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert (tmp_path / "x").read_text() == "content"


def test_another_broken_pipe_of_a_rank_does_not_count_as_done() -> None:
    """A broken pipe to another program is an error."""
    result = end("raise BrokenPipeError(32, 'Broken pipe')", of_ranks=True)
    assert result.returncode not in (errors.EXIT_DONE, errors.EXIT_REQUEUE)


def test_an_argument_that_is_not_utf8_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python hides its bytes in half surrogate pairs, which nothing can write."""
    monkeypatch.setattr(sys, "argv", ["program", "caf\u00e9", os.fsdecode(b"caf\xe9")])
    outcome = run_here(lambda _: sys.argv[2].encode() and None, [], capsys)
    assert "argument 'caf\\udce9' is not UTF-8: give it in UTF-8" in outcome.complaint()
    monkeypatch.setattr(sys, "argv", ["program", "caf\u00e9"])
    with pytest.raises(UnicodeEncodeError):
        cli.run(lambda _: "\udce9".encode() and None)


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environment", "coloured"),
    [
        (Terminal(), {"TERM": "xterm"}, True),
        (Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (Terminal(), {"TERM": "dumb"}, False),
        (io.StringIO(), {"TERM": "xterm"}, False),
    ],
)
def test_errors_are_red_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, environment: dict[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", stream)
    with pytest.raises(SystemExit):
        cli.fail("the disk is full")
    assert ("\033[" in stream.getvalue()) == coloured
    assert "error:" in stream.getvalue()
    assert stream.getvalue().endswith(" the disk is full\n")


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "message"),
    [
        ("0", "0", errors.UserError("no key"), "error: no key\n"),
        ("1", "1", errors.UserError("no key"), "error: no key\n"),
        ("9", "1", errors.UserError("no key"), "error: rank 9: no key\n"),  # of another node
        (
            "9",
            "1",
            PermissionError(13, "Denied", "x"),
            "error: rank 9: x: Denied. Check the path and its perm",
        ),
        ("0", "0", FileExistsError(17, "File exists", "x"), "error: x: File exists. Check the path"),
        ("0", "0", OSError(36, "File name too long", "x"), "error: x: File name too long. Check the path"),
        ("9", "1", OSError(28, "Full", "x"), "error: rank 9: x: Full. Free disk space and rerun"),
    ],
)
def test_an_error_names_the_rank_of_another_node(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rank: str,
    local_rank: str,
    error: Exception,
    message: str,
) -> None:
    """A path missing on one node only must not end a run silently."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    def main(_: object) -> None:
        raise error

    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.startswith(message)


RANK = """
import os, sys, time
from pipeline.base import cli, errors

def main(_):
    late, message = sys.argv[1:][int(os.environ["RANK"])].split(":")
    time.sleep(float(late))
    raise errors.UserError(message)

cli.run(main, of_ranks=True)
"""


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        (["0:no key", "0:no key", "0:no key"], ["no key"]),
        (["0.5:no key", "0:no key", "0.5:no key"], ["no key"]),  # rank 0 is ended before it comes so far
        (["60:no key", "60:no key", "0:no key"], ["no key"]),
        (["0:no key", "0.2:no file", "60:"], ["no file", "no key"]),
    ],
)
def test_an_error_is_said_once_whichever_rank_ends_first(
    tmp_path: Path, ranks: list[str], said: list[str]
) -> None:
    """The stand-in for torchrun ends all ranks as soon as one has ended."""
    reader, writer = os.pipe()
    place = {"WORLD_SIZE": "3", "MASTER_PORT": str(free_ports(1)[0])}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, *ranks],
            cwd=ROOT,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=writer,
        )
        for rank in range(3)
    ]
    os.close(writer)
    while all(process.poll() is None for process in started):
        time.sleep(0.05)
    for process in started:
        process.terminate()
        process.wait()
    with open(reader, encoding="utf-8") as output:
        assert sorted(output.read().splitlines()) == [f"error: {line}" for line in said]


def test_ranks_with_logs_of_their_own_all_say_an_error(tmp_path: Path) -> None:
    """SLURM gives every rank a file; the error is in whichever a user opens."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_PORT": str(free_ports(1)[0])}
    logs = [tmp_path / f"rank_{rank}.log" for rank in range(2)]
    with logs[0].open("w") as zero, logs[1].open("w") as one:
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, "0:no key", "0:no key"],
                cwd=ROOT,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stderr=log,
            )
            for rank, log in enumerate((zero, one))
        ]
        assert [process.wait() for process in started] == [2, 2]
    assert [log.read_text() for log in logs] == ["error: no key\n"] * 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file on a full disk")
def test_a_full_disk_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names the file, although ENOSPC from write() does not."""
    monkeypatch.setattr(files, "_writing", lambda path: Path("/dev/full"))
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)

    def main(_: object) -> None:
        with files.replacing(tmp_path / "scores.csv") as file:
            file.write(b"x")

    outcome = run_here(main, [], capsys)
    assert outcome.code == errors.EXIT_FAILED
    assert outcome.error.startswith(f"error: {tmp_path}/scores.csv: No space left on device. Free disk space")
    assert outcome.error.count("\n") == 1


def test_help_shows_the_defaults_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.ToolParser("What it does.")
    parser.add_argument("--needed", required=True, help="is needed")
    parser.add_argument("--count", type=int, default=3, help="has a default")
    parser.add_argument("--limit", type=int, help="has none")
    parser.add_argument("--keys", nargs="*", default=[], help="are none")
    parser.add_argument("--folders", nargs="*", default=[Path("a"), Path("b%")], help="are two")
    parser.add_argument("--flag", action="store_true", help="is off")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "--count COUNT         has a default (default: 3)" in lines
    assert "are two (default: a b%)" in lines
    assert sum("default" in line for line in lines) == 2


def test_a_setting_is_a_key_and_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    parser = cli.ToolParser("What it does.")
    cli.add_overrides(parser)
    options = parser.parse_args(["--set", "a.b=1", "c=", "--set", "d=x=y"])
    assert cli.overrides(options) == ["--a.b=1", "--c=", "--d=x=y"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--set", "a.b=1", "c"])
    assert "--set: c: write KEY=VALUE" in capsys.readouterr().err


def test_help_of_the_training_begins_with_one_line_of_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "usage: python -m pipeline.train --config configs/X.yaml [--section.key VALUE ...]"
    assert second == ""


TOOLS = sorted(path.stem for path in (ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("name", TOOLS)
def test_a_misspelt_option_is_named_with_the_nearest(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In every tool: also where the option is required, which argparse would call missing."""
    tool = importlib.import_module(f"tools.{name}")
    options = re.findall(r"^ +(--[a-z][a-z-]+)", run_here(tool.main, ["--help"], capsys).output, re.M)
    for option in dict.fromkeys(options):
        if option in ("--help", "--"):
            continue
        wrong = option[:-1] + ("x" if option[-1] != "x" else "y")
        complaint = run_here(tool.main, [wrong, "x"], capsys).complaint()
        assert f"unknown option '{wrong}'. Did you mean '--" in complaint
    assert "unknown option '--tokeniser'" in run_here(tool.main, ["--tokeniser=x"], capsys).complaint()


def test_the_cpus_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the affinity, and of SLURM; not all of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    for value, expected in ((None, 8), ("", 8), ("3", 3), ("99", 8), ("0", 1)):
        monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
        if value is not None:
            monkeypatch.setenv("SLURM_CPUS_PER_TASK", value)
        assert usable_cpus() == expected
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4(x2)")
    with pytest.raises(errors.UserError, match="SLURM_CPUS_PER_TASK is '4"):
        usable_cpus()


def test_a_link_to_nothing_is_called_one(tmp_path: Path) -> None:
    """The system's word for it is ``File exists``."""
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError) as found:
        link.mkdir()
    assert errors.why(found.value) == f"a link to {tmp_path / 'gone'}, which does not exist"
    (tmp_path / "gone").write_text("")
    with pytest.raises(FileExistsError) as found:
        link.mkdir()
    assert errors.why(found.value) == "File exists"

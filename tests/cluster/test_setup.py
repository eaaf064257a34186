"""The check of a machine: every line has a state and, where it is not ok, a remedy."""

from __future__ import annotations

import fcntl
import io
import json
from pathlib import Path

import pytest

from pipeline.cluster import setup
from pipeline.cluster.setup import Finding, all_checks, check_file_system, check_packages, check_python
from support.programs import ROOT, run_here
from support.runs import command
from tools import check_setup


def without_two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "check_two_ranks", lambda _: iter([Finding("2 ranks", "ok", "")]))


@pytest.mark.distributed
def test_this_machine_with_a_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the tests themselves need is there; two ranks add up a tensor."""
    given = iter(command(data, tmp_path / "run"))
    settings = [f"{key[2:]}={value}" for key, value in zip(given, given, strict=True)]
    arguments = [
        "--config",
        str(ROOT / "configs/sudoku_demo.yaml"),
        "--folder",
        str(tmp_path),
        "--json",
        "--set",
    ]
    outcome = run_here(check_setup.main, [*arguments, *settings], capsys)
    assert outcome.code == 0, outcome.output + outcome.error
    found = {each["what"]: each for each in json.loads(outcome.output)}
    for what in ("Python", "packages", "configuration", f"{tmp_path}", "all-reduce of 2 ranks (gloo)"):
        assert found[what]["state"] == "ok", found[what]
    assert found["GPUs"]["state"] == "warning"
    assert all(each["remedy"] for each in found.values() if each["state"] != "ok")
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_what_is_wrong_has_a_remedy_and_exit_code_1(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_two_ranks(monkeypatch)
    (tmp_path / "file").write_text("")
    settings = [
        f"data.tokenizer={data / 'tokenizer'}",
        f"data.prefixes=[{data / 'pairs'}]",
        "data.kind=packed",
    ]
    arguments = [
        "--config",
        str(ROOT / "configs/sudoku_demo.yaml"),
        "--folder",
        str(tmp_path / "file"),
        "--set",
    ]
    outcome = run_here(check_setup.main, [*arguments, *settings], capsys)
    assert outcome.code == 1
    failed = [line for line in outcome.output.splitlines() if line.startswith("failed")]
    assert len(failed) == 2
    assert f"{tmp_path / 'file'}: " in failed[0]
    assert "cannot be written" in failed[0]
    assert "holds pairs, but data.kind is 'packed' -> set data.kind to 'pairs'" in failed[1]


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'--folder'" in run_here(check_setup.main, ["--foldr", "x"], capsys).complaint()
    assert "nowhere.yaml" in run_here(check_setup.main, ["--config", "nowhere.yaml"], capsys).complaint()


def test_packages_are_compared_with_their_pins(tmp_path: Path) -> None:
    pins = tmp_path / "requirements.txt"
    pins.write_text('pytest==0.1  # a comment\nnumpy>=1.0\nnumpy==9; python_version < "3.0"\n')
    [finding] = check_packages(pins)
    assert finding.state == "warning"
    assert finding.fact.startswith("pytest is ")
    assert finding.fact.endswith("instead of ==0.1")
    pins.write_text("no-such-package-at-all==1.0\n")
    [finding] = check_packages(pins)
    assert (finding.state, finding.fact) == ("failed", "no-such-package-at-all is missing")
    assert "pip install -r" in finding.remedy
    assert [each.state for each in check_packages(ROOT / "requirements.txt")] == ["ok"]


def test_an_old_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup.sys, "version_info", (3, 9, 1))
    [finding] = check_python()
    assert finding.state == "failed"
    assert "3.10 to 3.12" in finding.remedy


def test_a_file_system_without_locks_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network file systems do it: every lock is granted."""
    whole, locks, speed = check_file_system(tmp_path)
    assert (whole.state, locks.state) == ("ok", "ok")
    assert "MB/s" in speed.fact
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    _, locks, _ = check_file_system(tmp_path)
    assert locks.state == "warning"


def test_states_are_coloured_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    finding = Finding("x", "failed", "is broken", "mend it")
    assert check_setup.line(finding) == "failed   x: is broken -> mend it"
    monkeypatch.setattr(check_setup.sys, "stdout", Terminal())
    assert check_setup.line(finding) == "\033[1;31mfailed  \033[0m x: is broken -> mend it"


def test_the_configuration_is_checked_only_where_there_is_one() -> None:
    assert len(all_checks(ROOT, [], None)) == 7

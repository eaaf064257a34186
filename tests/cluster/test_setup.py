"""The check of a machine: every line has a state and, where it is not ok, a remedy."""

from __future__ import annotations

import fcntl
import io
import json
from pathlib import Path

import pytest

from pipeline.cluster import setup
from pipeline.cluster.setup import Finding, all_checks, check_file_system, check_packages
from support.programs import ROOT, run_here
from support.runs import command
from tools import check_setup

pytestmark = pytest.mark.slow


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


PYPROJECT = """
Name: puma-pipeline
Requires-Python: >=3.10,<3.13
Provides-Extra: pictures
Provides-Extra: dev
Requires-Dist: as-tested<3,>=1
Requires-Dist: Of.A.Cluster<3,>=1
Requires-Dist: not_in_the_lock>=1
Requires-Dist: too-old<3,>=2
Requires-Dist: missing>=1
Requires-Dist: of-another-python>=1; python_version < "3"
Requires-Dist: painter>=1; extra == "pictures"
Requires-Dist: brush>=2; extra == "pictures"
Requires-Dist: linter>=1; extra == "dev"
"""
LOCK = """
as_tested==2.0  # a comment
of-a-cluster==2.0
too-old==2.0; python_version >= "3"
too-old==9.0; python_version < "3"
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a checkout; the interpreter finds invented packages, as pip would have described them."""
    (tmp_path / "requirements.txt").write_text(LOCK)
    (tmp_path / "requirements-dev.txt").write_text("painter==1.5\n")
    installed = {
        "as-tested": "2.0+cpu",
        "of-a-cluster": "1.5a0+cluster",
        "not-in-the-lock": "7",
        "too-old": "1.9",
        "brush": "1.0",
    }
    for name, version in installed.items():
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    folder = tmp_path / "puma_pipeline-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.4{PYPROJECT}Version: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_packages_are_tested_in_their_range_or_outside(packages: Path) -> None:
    _, *findings = check_packages(packages)
    found = {each.what: (each.state, each.fact, each.remedy) for each in findings}
    assert found == {
        "packages": ("ok", "1 as tested: as-tested 2.0+cpu", ""),
        "Of.A.Cluster": ("ok", "1.5a0+cluster is in the range <3,>=1, not the tested ==2.0", ""),
        "not_in_the_lock": ("ok", "7 is in the range >=1", ""),
        "too-old": ("failed", "1.9 is outside of <3,>=2", "pip install 'too-old<3,>=2'"),
        "missing": ("failed", "is missing", "pip install 'missing>=1'"),
        "painter": (
            "warning",
            "is not installed: the extra 'pictures' needs it",
            "pip install 'puma-pipeline[pictures]' if you use it",
        ),
        "brush": ("warning", "1.0 is outside of >=2", "pip install 'brush>=2'"),
    }


@pytest.mark.usefixtures("packages")
def test_another_interpreter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert next(check_packages(tmp_path)).state == "ok"
    for version in ("3.9.1", "3.13.0"):
        monkeypatch.setattr(setup.platform, "python_version", lambda version=version: version)
        finding = next(check_packages(tmp_path))
        assert (finding.state, finding.fact) == ("failed", f"{version} is outside of <3.13,>=3.10")
        assert "PYTHON=" in finding.remedy


def test_a_package_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkout is found by PYTHONPATH alone."""
    monkeypatch.setattr(setup, "DISTRIBUTION", "no-such-distribution")
    [finding] = check_packages(tmp_path)
    assert finding.state == "failed"
    assert finding.remedy == f"pip install --editable {tmp_path}"


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
    finding = Finding("x", "failed", "is broken", "fix it")
    assert check_setup.line(finding) == "failed   x: is broken -> fix it"
    monkeypatch.setattr(check_setup.sys, "stdout", Terminal())
    assert check_setup.line(finding) == "\033[1;31mfailed  \033[0m x: is broken -> fix it"


def test_the_configuration_is_checked_only_where_there_is_one() -> None:
    assert len(all_checks(ROOT, [], None)) == 6

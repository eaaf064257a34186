"""Settings of every test: one thread a process, because several run side by side; no GPU without -m gpu."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

if TYPE_CHECKING:
    from support.programs import Outcome


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs, before torch is imported, from all tests but those that are run by ``-m gpu``.

    Triton's kernels are loops on the CPU then.
    """
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Give this process its signals back: a run that ends early ignores them, and so would later children."""
    from pipeline.resilience.signals import SIGNALS

    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restore the environment: a run sets a launcher's variables, and later runs would believe them."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture(autouse=True)
def no_processes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a test without the mark `slow` fail when it starts a process: `make test-fast` promises none."""
    if not any(request.node.get_closest_marker(name) for name in ("slow", "distributed", "slurm")):
        monkeypatch.setattr("subprocess.Popen.__init__", _refuse)


def _refuse(*arguments: object, **options: object) -> None:
    raise AssertionError(f"a test that starts {arguments[1:2]} needs the mark slow")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tokenizer and 60 tokenized pairs of different lengths."""
    from support.runs import write_pairs

    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder)
    return folder


@pytest.fixture
def train(data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Return a function that trains in this process by the plain engine."""
    from pipeline import train as program
    from support.programs import run_here
    from support.runs import command

    def run(run_dir: Path, *more: str) -> Outcome:
        return run_here(program.main, command(data, run_dir, "--engine.kind", "plain", *more), capsys)

    return run

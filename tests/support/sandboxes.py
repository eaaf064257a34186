"""Sandboxes for the tests, programs that try to get out of them, and what the machine outside shows."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.evaluation import sandbox
from pipeline.evaluation.sandbox import Limits, Outcome, Sandbox

SECRET = "the secret of the parent"
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


def said(outcome: Outcome) -> str:
    """Return all that came out of a program; it has to have come to its end."""
    assert outcome.value is not None, outcome.error
    return outcome.value

"""Programs in the sandbox: their results, and the servers that run them."""

from __future__ import annotations

import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from pipeline.base.errors import Failure, UserError
from pipeline.evaluation import sandbox
from pipeline.evaluation.sandbox import Limits, Outcome, Sandbox
from support.sandboxes import started

pytestmark = pytest.mark.slow

REQUIRED = ["limits", "no_new_privs", "seccomp"]


def test_the_layers(box: Sandbox, request: pytest.FixtureRequest) -> None:
    """The required layers are always active; an older kernel has no others."""
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
        (
            "from dataclasses import dataclass, field\n@dataclass(order=True, slots=True)\nclass A:\n"
            "    x: int\n    y: list = field(default_factory=list)\ndef f(): return A(4).x",
            "4",
        ),
        (
            "from __future__ import annotations\nfrom dataclasses import KW_ONLY, dataclass\n@dataclass\n"
            "class A:\n    x: int\n    _: KW_ONLY\n    y: int = 2\ndef f(): return A(1, y=3).y",
            "3",
        ),
        ("import typing\ndef g(a: int): ...\ndef f(): return typing.get_type_hints(g)['a'] is int", "True"),
        ("def f(x: int = 3): return f.__annotations__['x'].__name__", "int"),
        ("def f():\n    größe = 3; π = 4\n    return größe + π", "7"),
        ("def f():\n    ﬁ = 3\n    return fi", "3"),
        ("def 计算(): return '\\N{GREEK SMALL LETTER ALPHA}'", "α"),
        ("def f(): return 'a' + chr(0xd800)", "a?"),
        ("from functools import cache\n@cache\ndef solution(): return 3\ndef g(): return 4", "3"),
        ("def f(): return mean([1, 3])\nfrom statistics import mean", "2"),
        ("def f(x=[1, 2, 3]):\n    match x:\n        case [a, *r] if a: return a + len(r)", "3"),
        ("from typing import NamedTuple\nclass A(NamedTuple):\n    x: int\ndef f(): return A(3).x", "3"),
        (
            "import array, contextlib, hashlib, inspect, io, pprint, struct, types, weakref\n"
            "def f(): return hashlib.sha256(b'').hexdigest()[:4]",
            "e3b0",
        ),
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
        ("def f(): raise ValueError('a' + chr(0xd800))", "ValueError: a?"),
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
    """A forged result is an error of its program and does not affect others."""
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
    """Without the seccomp filter the sandbox refuses to start, with one error and the remedy."""
    with pytest.raises(UserError, match=rf"no sandbox on this machine: .*{reason}.*CONFIG_SECCOMP_FILTER"):
        started(what, Limits())


def test_an_interrupted_program_answers_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next program never gets the value of an interrupted one."""

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
        with pytest.raises(Failure, match="was killed from outside"):
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

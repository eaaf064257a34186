"""Programs a second in the sandbox, beside a new Python process for each, which protects nothing.

python -m benchmarks.sandbox --programs 2000
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipeline.base.cli import ToolParser, run
from pipeline.evaluation.sandbox import Sandbox


def program(number: int) -> str:
    """Return a program such as TinyGSM's."""
    return (
        "def simple_math_problem() -> int:\n    '''\n    Tom has 4 boxes of apples.\n    '''\n"
        f"    boxes = 4\n    apples = {number}\n    result = boxes * apples\n    return result\n"
    )


def rate(result: Callable[[str], str | None], count: int, workers: int) -> float:
    """Return programs a second; every result is compared."""
    programs = [program(number) for number in range(count)]
    began = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        values = list(pool.map(result, programs))
    seconds = time.perf_counter() - began
    assert values == [str(4 * number) for number in range(count)]
    return count / seconds


def in_new_process(text: str) -> str:
    """Run a program as anybody would at first."""
    command = [sys.executable, "-I", "-S", "-c", f"{text}\nprint(simple_math_problem())"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line for each number of servers."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--programs", type=int, default=2000, help="in the sandbox; a tenth of them without")
    options = parser.parse_args(arguments)
    for servers in (1, 2):
        with Sandbox(servers=servers) as sandbox:
            ours = rate(lambda text, box=sandbox: box.run(text).value, options.programs, servers)  # type: ignore[misc]
        theirs = rate(in_new_process, options.programs // 10, servers)
        print(
            f"servers {servers}: sandbox {ours:.0f} programs/s, new processes {theirs:.0f} programs/s, "
            f"ratio {ours / theirs:.1f}, layers {' '.join(sandbox.layers)}"
        )


if __name__ == "__main__":
    run(main)

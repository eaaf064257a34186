"""Average the weights of several checkpoints of one model into a checkpoint of its own.

The result is a --checkpoint for tools/evaluate.py, tools/generate.py and tools/export_hf.py, and the
train.initial_weights of a new run. It holds no optimizer states, so no run resumes from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import require_new
from pipeline.checkpoint.manifest import find
from pipeline.checkpoint.options import add_options, check_shares


def main(arguments: Sequence[str] | None = None) -> None:
    """Average checkpoints."""
    parser = ToolParser(__doc__ or "")
    add_options(parser, several="+")
    parser.add_argument("--shares", nargs="+", type=float, help="share of each checkpoint (default: equal)")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    options = parser.parse_args(arguments)
    require_new(options.output)
    check_shares(len(options.checkpoint), options.shares)
    for path in options.checkpoint:
        find(path)
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.checkpoint.averaging import average

    step = average(options.checkpoint, options.shares, options.output, options.weights, not options.no_verify)
    print(f"wrote {options.output}: {len(options.checkpoint)} checkpoints, settings of step {step}")


if __name__ == "__main__":
    run(main)

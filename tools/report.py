"""Write an HTML report of one or more runs: curves, time use, restarts, skipped steps, texts, settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import replace_text
from pipeline.monitor.report import report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report, a single file that needs no network."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders; several runs are compared"
    )
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="HTML file to write")
    options = parser.parse_args(arguments)
    page = report(options.runs)
    replace_text(options.output, page)
    print(f"wrote {options.output} ({len(page) / 1e3:,.0f} kB)")


if __name__ == "__main__":
    run(main)

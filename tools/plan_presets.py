"""Plan every shipped configuration and write the table of docs/explanation/presets.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import replace_text

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace the table in the document."""
    ToolParser(__doc__ or "").parse_args(arguments)
    # Imported now: torch takes seconds, and help needs none of it.
    from pipeline.planning.presets import DOCUMENT, table, with_table

    path = ROOT / DOCUMENT
    written = with_table(path.read_text(encoding="utf-8"), table(ROOT))
    replace_text(path, written)
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    run(main)

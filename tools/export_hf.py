"""Write a checkpoint as a folder for Hugging Face's transformers: safetensors, config, tokenizer, model card.

One process on the CPU exports what any number of ranks trained; memory is about one shard. In transformers:
AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.cli import ToolParser, UserError, run
from pipeline.huggingface.export import export
from pipeline.monitor.progress import Progress
from pipeline.sampling import WEIGHTS_HELP

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def size_in_bytes(text: str) -> int:
    """Return the bytes of a size such as 5GB; raise a `UserError` when it is none."""
    match = re.fullmatch(r"(\d+) ?(KB|MB|GB)", text.upper())
    if match is None or int(match[1]) == 0:
        raise UserError(f"--max-shard-size is {text!r}: give a whole number with KB, MB or GB, such as 5GB.")
    return int(match[1]) * UNITS[match[2]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a checkpoint."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--weights", choices=["ema", "raw"], help=WEIGHTS_HELP)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="type of the numbers in the files"
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", help="largest file of weights, and about the memory that is used"
    )
    options = parser.parse_args(arguments)
    limit = size_in_bytes(options.max_shard_size)
    progress: Progress | None = None

    def advance(written: int, total: int) -> None:
        nonlocal progress
        progress = progress or Progress(total, 0, "weight")
        progress.advance(written)

    step = export(options.checkpoint, options.output, options.weights, options.dtype, limit, advance)
    if progress is not None:
        progress.close()
    print(f"wrote {options.output}: step {step}, {options.dtype}")


if __name__ == "__main__":
    run(main)

"""Print a trained model's completions of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from pipeline.cli import ToolParser, UserError, run
from pipeline.sampling import WEIGHTS_HELP, complete, load_model
from pipeline.sampling.settings import add_options, read_options


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each prompt with its completion."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--checkpoint", required=True, type=Path, help="run folder or checkpoint folder")
    parser.add_argument("--weights", choices=["ema", "raw"], help=WEIGHTS_HELP)
    parser.add_argument("--prompt", required=True, nargs="+", help="texts to complete; '' for none")
    parser.add_argument("--length", type=int, default=None, help="tokens to add (default: all that fit)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts decoded together")
    add_options(parser)
    options = parser.parse_args(arguments)
    settings = read_options(options)
    for name in ("length", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be 1 or more.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(options.checkpoint, device, weights=options.weights)
    found = complete(loaded, options.prompt, settings, options.length, options.batch_size)
    for prompt, completion in zip(options.prompt, found, strict=True):
        print(f"{prompt}{completion.text}")


if __name__ == "__main__":
    run(main)

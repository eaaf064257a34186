"""Export a checkpoint to a Hugging Face transformers folder: safetensors, config, tokenizer, model card.

A single CPU process exports a checkpoint of any number of ranks; memory is about one shard. Load the folder
with AutoModelForMaskedLM.from_pretrained(FOLDER, trust_remote_code=True), or choose the format of another
project with --format.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.files import require_new
from pipeline.checkpoint.manifest import find
from pipeline.checkpoint.options import add_options
from pipeline.corpus.arguments import TEMPLATE_HELP
from pipeline.huggingface.export_options import add_shard_argument


def main(arguments: Sequence[str] | None = None) -> None:
    """Export a checkpoint."""
    parser = ToolParser(__doc__ or "")
    add_options(parser)
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="data type of the weights"
    )
    parser.add_argument(
        "--format",
        choices=["own", "llada", "dream", "sdar", "a2d"],
        default="own",
        help="names of settings and weights: our own, with code for transformers, or those of LLaDA, Dream, "
        "SDAR or dllm's A2D models, for code that knows these",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        help=f"write it into the folder instead of that of the training: {TEMPLATE_HELP}",
    )
    add_shard_argument(parser)
    options = parser.parse_args(arguments)
    require_new(options.output)
    find(options.checkpoint)
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.corpus.chat_template import read_template
    from pipeline.huggingface.export import export

    template = options.chat_template and read_template(options.chat_template)
    limit = options.max_shard_size
    verify = not options.no_verify
    chosen = (options.weights, options.dtype, limit, verify, options.format, template)
    step = export(options.checkpoint, options.output, *chosen)
    print(f"wrote {options.output}: step {step}, {options.dtype}, format {options.format}")


if __name__ == "__main__":
    run(main)

"""Make a folder that a run starts from out of a Qwen2, Qwen3 or Llama model of Hugging Face, on this disk.

The folder of the model must hold config.json, safetensors and tokenizer.json; nothing is downloaded. What is
made holds weights, tokenizer, and the settings of a run that fit (model.yaml): preprocess the corpus with its
tokenizer, and start with --config configs/X.yaml --config OUTPUT/model.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.huggingface.folders import add_shard_argument
from pipeline.huggingface.importing import SETTINGS_FILE, import_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Import a model."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--input", required=True, type=Path, help="folder of the Hugging Face model")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    for use, otherwise in (
        ("mask", "a usual one such as <mask>, or a new token"),
        ("pad", "a usual one, or a new token"),
        ("eos", "a usual one such as <|endoftext|>"),
    ):
        parser.add_argument(f"--{use}-token", help=f"its {use} token; without the option {otherwise}")
    add_shard_argument(parser)
    options = parser.parse_args(arguments)
    tokens = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
    imported = import_model(options.input, options.output, tokens, options.max_shard_size)
    vocabulary = imported.vocabulary
    print(
        f"wrote {options.output}: {vocabulary.tokens} tokens in {vocabulary.rows} rows of the embedding "
        f"(before: {imported.old_rows})"
    )
    print(
        f"the mask token is {imported.mask}, id {vocabulary.mask_id}; tokens that were added: "
        f"{', '.join(imported.added) or 'none'}; the embeddings of all these start at the mean of the others"
    )
    print(
        "a causal model predicts each token one position before it, so model.prediction is shifted; to let "
        "attention grow from causal to bidirectional, set objective.attention_annealing_steps, such as 10000"
    )
    print(f"settings of a run that starts from it ({options.output / SETTINGS_FILE}):\n\n{imported.settings}")


if __name__ == "__main__":
    run(main)

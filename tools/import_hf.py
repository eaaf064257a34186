"""Import a local Hugging Face model (Qwen2, Qwen3 or Llama) as the initial weights of a run.

The model folder must contain config.json, safetensors and tokenizer.json; nothing is downloaded. The output
folder contains the weights, the tokenizer and matching settings for a run (model.yaml). Preprocess the corpus
with this tokenizer, and train with --config configs/X.yaml --config OUTPUT/model.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.huggingface.options import add_shard_argument


def main(arguments: Sequence[str] | None = None) -> None:
    """Import a model."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--input", required=True, type=Path, help="folder of the Hugging Face model")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    for use, otherwise in (
        ("mask", "a common one such as <mask>, else a new token"),
        ("pad", "a common one, else a new token"),
        ("eos", "a common one such as <|endoftext|>"),
    ):
        parser.add_argument(f"--{use}-token", help=f"{use} token (default: {otherwise})")
    add_shard_argument(parser)
    options = parser.parse_args(arguments)
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.huggingface.importing import SETTINGS_FILE, import_model

    tokens = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
    imported = import_model(options.input, options.output, tokens, options.max_shard_size)
    vocabulary = imported.vocabulary
    print(
        f"wrote {options.output}: {vocabulary.tokens} tokens in {vocabulary.rows} rows of the embedding "
        f"(before: {imported.old_rows})"
    )
    print(
        f"the mask token is {imported.mask}, id {vocabulary.mask_id}; added tokens: "
        f"{', '.join(imported.added) or 'none'}; the embeddings of these start at the mean of the others"
    )
    print(
        "a causal model predicts each token from the position before it, so model.prediction is shifted; to "
        "anneal attention from causal to bidirectional, set objective.attention_annealing_steps (10000, say)"
    )
    print(f"settings of a run with these weights ({options.output / SETTINGS_FILE}):\n\n{imported.settings}")


if __name__ == "__main__":
    run(main)

"""Import a local Hugging Face model as the initial weights of a run.

Causal models: Qwen2, Qwen3, Llama. Diffusion models: LLaDA, Dream, SDAR, and dllm's A2D models. The folder
must contain config.json, safetensors and tokenizer.json. Nothing is downloaded, and no code in it is run. The
output folder contains the weights, the tokenizer and matching settings for a run (model.yaml). Preprocess the
corpus with this tokenizer, and train with --config configs/X.yaml --config OUTPUT/model.yaml.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.base.cli import ToolParser, run
from pipeline.base.errors import UserError
from pipeline.base.files import require_new
from pipeline.checkpoint.manifest import CONFIG_FILE, is_export
from pipeline.huggingface.export_options import add_shard_argument

START = {
    False: "; the embeddings of these start at the mean of the others",
    True: "; the embeddings of rows that were there are unchanged",
}
PREDICTION = {
    "same": "the model predicts each token at its own position, so model.prediction is same",
    "shifted": "the model predicts each token from the position before it, so model.prediction is shifted",
}
ANNEALING = (
    "to anneal attention from causal to bidirectional, set objective.attention_annealing_steps (10000, say)"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Import a model."""
    parser = ToolParser(__doc__ or "")
    parser.add_argument("--input", required=True, type=Path, help="folder of the Hugging Face model")
    parser.add_argument("--output", required=True, type=Path, help="folder to create")
    for use, otherwise in (
        ("mask", "the model's, else a common one such as <mask>, else a new token"),
        ("pad", "the model's, else a common one, else a new token"),
        ("eos", "the model's, else a common one such as <|endoftext|>"),
    ):
        parser.add_argument(f"--{use}-token", help=f"{use} token (default: {otherwise})")
    parser.add_argument(
        "--prediction",
        choices=["same", "shifted"],
        help="hidden state that predicts a position (default: shifted for causal models, same for A2D; it is "
        "fixed for the others)",
    )
    parser.add_argument(
        "--block-size", type=int, help="tokens of a block, for SDAR and A2D models whose config.json lacks it"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare the files with the folder's SHA256SUMS"
    )
    add_shard_argument(parser)
    options = parser.parse_args(arguments)
    require_new(options.output)
    if not is_export(options.input):
        raise UserError(
            f"--input {options.input} has no {CONFIG_FILE}: give the folder of a Hugging Face model."
        )
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    from pipeline.huggingface.importing import SETTINGS_FILE, import_model

    tokens = {use: getattr(options, f"{use}_token") for use in ("mask", "pad", "eos")}
    imported = import_model(
        options.input,
        options.output,
        tokens,
        options.max_shard_size,
        options.prediction,
        options.block_size,
        verify=not options.no_verify,
    )
    vocabulary = imported.vocabulary
    print(
        f"wrote {options.output}: {vocabulary.tokens} tokens in {vocabulary.rows} rows of the embedding "
        f"(before: {imported.old_rows})"
    )
    print(
        f"the mask token is {imported.mask}, id {vocabulary.mask_id}; added tokens: "
        f"{', '.join(imported.added) or 'none'}" + START[imported.is_diffusion]
    )
    print(PREDICTION[imported.prediction])
    if not imported.is_diffusion:
        print(ANNEALING)
    print(f"settings of a run with these weights ({options.output / SETTINGS_FILE}):\n\n{imported.settings}")


if __name__ == "__main__":
    run(main)

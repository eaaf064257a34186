"""The command-line arguments that say what a corpus is, shared by the data tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.cli import UserError
from pipeline.data.records import Keys


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --input and the keys of jsonl lines."""
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="jsonl or txt files")
    parser.add_argument("--text-key", help="key of a jsonl line's text (default: text)")
    parser.add_argument("--prompt-key", help="key of the prompt, which is never masked")
    parser.add_argument("--answer-key", help="key of the answer; with --prompt-key instead of --text-key")


def corpus_keys(options: argparse.Namespace) -> Keys:
    """Return the keys that were given; raise a `UserError` for a half or double choice."""
    pair = (options.prompt_key, options.answer_key)
    if (pair[0] is None) != (pair[1] is None):
        missing = "--prompt-key" if pair[0] is None else "--answer-key"
        raise UserError(f"{missing} is missing: --prompt-key and --answer-key go together.")
    if pair[0] is None:
        return Keys((options.text_key or "text",))
    if options.text_key is not None:
        raise UserError("--text-key excludes --prompt-key and --answer-key: give one or the other.")
    return Keys(pair)

"""The command-line arguments that name a corpus, shared by the data tools."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.base.cli import option
from pipeline.base.errors import UserError
from pipeline.corpus.records import MAX_BAD_FRACTION, MESSAGE_FORMAT, Keys

TEMPLATE_HELP = (
    "the chat template of transformers in a tokenizer's folder, in its tokenizer_config.json, or in a "
    "Jinja file"
)


def add_template_options(parser: argparse.ArgumentParser, what: str) -> None:
    """Add --chat and --chat-template to a program that asks a model; `what` they do to a prompt."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--chat", action="store_true", help=f"{what}, by the chat template that wrote the training data"
    )
    group.add_argument("--chat-template", type=Path, help=f"{what}, by {TEMPLATE_HELP}")


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --input and the options for the keys of records and for bad ones."""
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        default=[],
        help="jsonl, txt (both also .gz, .zst, .bz2, .xz), parquet or arrow files; globs in quotes; folders; "
        "@FILE: a list of inputs, one per line; -: standard input",
    )
    parser.add_argument("--text-key", help="key of the text, a.b if nested (default: text)")
    parser.add_argument("--prompt-key", help="key of the prompt, which is never masked")
    parser.add_argument("--answer-key", help="key of the answer; with --prompt-key instead of --text-key")
    parser.add_argument(
        "--messages-key",
        help="key of a list of chat messages {role, content}: the last is the answer, the others the prompt",
    )
    parser.add_argument(
        "--message-format",
        default=MESSAGE_FORMAT,
        type=lambda text: text.replace("\\n", "\n"),
        help="format of a message in the prompt (\\n: line end); the part before {content} opens the answer; "
        "special tokens of the tokenizer in it, such as <|im_start|>, become those tokens",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        help=f"write the messages by a template, not by --message-format; {TEMPLATE_HELP}",
    )
    parser.add_argument(
        "--every-turn",
        action="store_true",
        help="make each message by the assistant an answer, given those before it, not only the last",
    )
    parser.add_argument(
        "--split-documents",
        choices=["line", "sentence", "file"],
        help="make each line, sentence or .txt file a document (default for .txt: each paragraph)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=MAX_BAD_FRACTION,
        help="stop if a larger share is bad: of the records, or of the bytes in files that cannot be read",
    )


def corpus_keys(options: argparse.Namespace) -> Keys:
    """Return the keys given by the options; raise a `UserError` if they are incomplete or contradict."""
    if not 0 <= options.max_bad_fraction <= 1:
        raise UserError(f"--max-bad-fraction is {options.max_bad_fraction}: it must be a share from 0 to 1.")
    pair = (options.prompt_key, options.answer_key)
    if (pair[0] is None) != (pair[1] is None):
        missing = "--prompt-key" if pair[0] is None else "--answer-key"
        raise UserError(f"{missing} is missing: --prompt-key and --answer-key go together.")
    chosen = [
        name
        for name, given in (
            ("--text-key", options.text_key),
            ("--prompt-key and --answer-key", pair[0]),
            ("--messages-key", options.messages_key),
        )
        if given is not None
    ]
    if len(chosen) > 1:
        raise UserError(f"{chosen[0]} excludes {chosen[1]}: give one or the other.")
    if options.split_documents is not None and chosen not in ([], ["--text-key"]):
        raise UserError(f"--split-documents splits texts: it cannot be combined with {chosen[0]}.")
    if options.messages_key is not None:
        if "{content}" not in options.message_format:
            raise UserError(f"--message-format is {options.message_format!r}: it must contain {{content}}.")
        template = None
        if options.chat_template is not None:
            if options.message_format != MESSAGE_FORMAT:
                raise UserError("--chat-template excludes --message-format: give one or the other.")
            from pipeline.corpus.chat_template import read_template  # Jinja is rarely needed

            template = read_template(options.chat_template)
        return Keys(
            (options.messages_key,),
            messages=True,
            message_format=options.message_format,
            chat_template=template,
            every_turn=options.every_turn,
        )
    for name, default in (("message_format", MESSAGE_FORMAT), ("chat_template", None), ("every_turn", False)):
        if getattr(options, name) != default:
            raise UserError(f"{option(name)} has no effect without --messages-key: give it, too.")
    if pair[0] is not None:
        if pair[0] == pair[1]:
            raise UserError(f"--prompt-key and --answer-key are both {pair[0]}: give each its own key.")
        return Keys(pair)
    return Keys(("text" if options.text_key is None else options.text_key,), split=options.split_documents)

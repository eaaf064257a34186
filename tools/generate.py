"""Continue prompts with a trained model, or fill in masked spans.

Without --prompt and --prompt-file, each line of standard input is a prompt. A terminal shows the text while
it is decoded; otherwise, or with --json, only the result is printed. Several samples are separated by a line
such as "==> prompt 1, sample 2 <==".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from pipeline.base.cli import ToolParser, require_at_least_one, run
from pipeline.base.errors import UserError
from pipeline.base.progress import Progress
from pipeline.checkpoint.options import add_options as add_checkpoint_options
from pipeline.corpus.arguments import add_template_options
from pipeline.decoding.prompts import read_prompts, spans
from pipeline.decoding.sampling import add_options, read_options
from pipeline.huggingface.export_options import check_there

if TYPE_CHECKING:
    from pipeline.decoding.cells import Show
    from pipeline.decoding.samples import Sample

MOST_ANIMATED = 16
SPAN_HELP = "[MASK*N] in a text marks N tokens to fill in, given the text before and after"


def build_parser() -> ToolParser:
    """Return the command line."""
    parser = ToolParser(__doc__ or "")
    add_checkpoint_options(parser, exports=True)
    types = ["float32", "bfloat16"]
    parser.add_argument(
        "--dtype", choices=types, default=types[0], help="data type of the weights; logits are fp32"
    )
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", nargs="+", action="extend", help=f"texts to continue, '' for none; {SPAN_HELP}"
    )
    prompts.add_argument("--prompt-file", type=Path, help="txt with one prompt per line, jsonl or parquet")
    parser.add_argument("--prompt-key", default="prompt", help="key of the prompt in jsonl or parquet")
    add_template_options(parser, "make each text a message of a user")
    parser.add_argument("--length", type=int, help="tokens to add (default: all that fit)")
    parser.add_argument("--num-samples", type=int, default=1, help="samples per prompt")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per batch")
    parser.add_argument(
        "--json", action="store_true", help="print one line of JSON per sample, with the order of unmasking"
    )
    parser.add_argument(
        "--animate", type=Path, help="write an animation of the unmasking to a .html or .gif file"
    )
    parser.add_argument("--font", type=Path, help="TrueType font for a .gif; the built-in font is ASCII only")
    add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print each prompt with its completion."""
    options = build_parser().parse_args(arguments)
    settings = read_options(options)
    require_at_least_one(options, "length", "num_samples", "batch_size")
    prompts = options.prompt or (
        read_prompts(options.prompt_file, options.prompt_key) if options.prompt_file else read_stdin()
    )
    check_prompts(prompts)
    texts = list(map(spans, prompts))
    if options.length is not None and all(any(isinstance(p, int) for p in pieces) for pieces in texts):
        raise UserError("--length has no effect on texts with [MASK*N], whose N is the length: leave it out.")
    if options.animate is not None:
        from pipeline.decoding.animation import check_animation  # Pillow takes a while, too

        check_animation(options.animate, options.font)
        if len(prompts) * options.num_samples > MOST_ANIMATED:
            raise UserError(
                f"--animate draws at most {MOST_ANIMATED} sequences, but there are "
                f"{len(prompts) * options.num_samples}: give fewer prompts or a smaller --num-samples."
            )
    template = None
    if options.chat or options.chat_template is not None:
        from pipeline.corpus.chat_template import asked, read_template

        template = options.chat_template and read_template(options.chat_template)
        if any(isinstance(piece, int) for pieces in texts for piece in pieces):
            given = "--chat" if options.chat else "--chat-template"
            raise UserError(f"{given} has no effect on texts with [MASK*N]: leave one of the two out.")
    check_there(options.checkpoint)
    # Imported now: torch takes seconds, and neither help nor a wrong option needs it.
    import torch

    from pipeline.decoding.animation import write_animation
    from pipeline.decoding.frames import Recorder
    from pipeline.decoding.samples import generate
    from pipeline.decoding.terminal import LiveView
    from pipeline.huggingface.loading import load_any

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype)
    verify = not options.no_verify
    loaded = load_any(options.checkpoint, device, weights=options.weights, dtype=dtype, verify=verify)
    if options.num_samples > 1 and settings.temperature == 0 and settings.policy != "random":
        message = "at temperature 0 the samples of a prompt are alike: set --temperature"
        print(f"warning: --num-samples is {options.num_samples}, but {message}", file=sys.stderr)

    on_terminal = sys.stdout.isatty() and not options.json and os.environ.get("TERM") != "dumb"
    view = LiveView(sys.stdout, colours="NO_COLOR" not in os.environ) if on_terminal else None
    recorder = Recorder() if options.animate is not None else None
    shows: list[Show] = [each.show for each in (view, recorder) if each is not None]
    progress = Progress(len(prompts) * options.num_samples, 0, "sample", enabled=view is None)
    shape = (options.num_samples, options.length, options.batch_size)
    as_asked: Callable[[str], str] = str
    if options.chat:
        template = loaded.own_template("--chat", "name one by --chat-template")
    if template is not None:
        as_asked = partial(asked, template, specials=list(loaded.tokenizer.model.specials()))
    for done, sample in enumerate(generate(loaded, prompts, settings, *shape, shows, as_asked), 1):
        if view is not None:
            view.clear()
        print(as_json(sample) if options.json else as_text(sample, done, shape[0], len(prompts)), flush=True)
        progress.advance(done)
    progress.close()
    if recorder is not None:
        write_animation(options.animate, recorder.sequences(), options.font)
        print(f"wrote {options.animate}", file=sys.stderr)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise a `UserError` for a prompt that is not UTF-8: Python hides such bytes in half surrogate pairs."""
    for number, prompt in enumerate(prompts, 1):
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise UserError(f"prompt {number}, {prompt!r}, is not UTF-8: convert it first.") from None


def read_stdin() -> list[str]:
    """Return the non-empty lines of standard input."""
    if sys.stdin.isatty():
        raise UserError("no prompt: give --prompt, --prompt-file, or lines on standard input.")
    try:
        prompts = [line for line in sys.stdin.read().splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start}): convert it first.") from None
    if not prompts:
        raise UserError("standard input is empty: give one prompt per line.")
    return prompts


def as_text(sample: Sample, place: int, samples: int, prompts: int) -> str:
    """Return a sample as text; one of several has a line above it, since a text may have any lines itself.

    Args:
        sample: the sample.
        place: its place among all samples, from 1.
        samples: samples per prompt.
        prompts: number of prompts.
    """
    if samples * prompts == 1:
        return sample.text
    which = f"prompt {(place - 1) // samples + 1}, sample {sample.number + 1}"
    return f"==> {which} <==\n{sample.text}"


def as_json(sample: Sample) -> str:
    """Return a sample as one line of JSON."""
    done = sample.completion
    facts = {"prompt": sample.prompt, "sample": sample.number, "text": done.text, "tokens": done.tokens}
    return orjson.dumps(facts | {"order": done.order, "steps": done.steps}).decode()


if __name__ == "__main__":
    run(main)

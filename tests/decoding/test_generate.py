"""tools/generate.py: sources of prompts, and output of samples."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.decoding import terminal
from pipeline.decoding.animation import page, write_animation
from pipeline.decoding.cells import Cell, Frame
from pipeline.decoding.frames import Recorder, pieces
from pipeline.decoding.prompts import spans
from pipeline.decoding.samples import generate
from pipeline.decoding.sampling import SamplingSettings
from support.programs import Outcome, run_here
from tools import generate as program

pytestmark = pytest.mark.slow

Generate = Callable[..., Outcome]


@pytest.fixture
def call(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> Generate:
    """Return a function that runs the tool."""
    return lambda *arguments: run_here(program.main, ["--checkpoint", str(run_folder), *arguments], capsys)


def test_prompts_from_everywhere(call: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments, lines, records and standard input give the same samples, at any batch size."""
    prompts = ["abc", "fa[MASK*3]b", "e"]
    lines, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(prompts) + "\n\n")
    records.write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in prompts))
    more = ("--temperature", "1", "--length", "4", "--num-samples", "3", "--seed", "7")
    first = call("--prompt", *prompts, *more)
    assert first.code == 0, first.error
    assert call("--prompt-file", str(lines), *more).output == first.output
    assert call("--prompt-file", str(records), "--prompt-key", "question", *more).output == first.output
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(prompts)))
    assert call(*more, "--batch-size", "2").output == first.output
    assert call("--prompt", *prompts, *more[:-1], "8").output != first.output

    found = [json.loads(line) for line in call("--prompt", *prompts, *more, "--json").output.splitlines()]
    assert [(one["prompt"], one["sample"]) for one in found] == [(p, i) for p in prompts for i in range(3)]
    whole = [one["text"] if "[" in one["prompt"] else one["prompt"] + one["text"] for one in found]
    heads = [f"==> prompt {prompt}, sample {sample} <==" for prompt in (1, 2, 3) for sample in (1, 2, 3)]
    printed = [f"{head}\n{text}\n" for head, text in zip(heads, whole, strict=True)]
    assert "".join(printed) == first.output
    assert call("--prompt", "abc", "--length", "4").output.startswith("abc"), "a single one stands alone"
    for one in found:
        length = 3 if "[" in one["prompt"] else 4
        assert len(one["tokens"]) == len(one["order"]) <= length
        assert max(one["order"]) < one["steps"] <= length
    assert all(re.fullmatch("fa.*b", one["text"], re.DOTALL) for one in found[3:6])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--prompt a[MASK*0]b", r"\[MASK\*0\] in 'a\[MASK\*0\]b': give the number of tokens"),
        ("--prompt a --num-samples 0", "--num-samples is 0: it must be 1 or more"),
        ("--prompt a --top-k 3", "--top-k is 3: it has no effect at temperature 0"),
        ("--prompt a --animate x.mp4", "--animate x.mp4: name a file that ends with .html or .gif"),
        ("--prompt a --animate x.gif --font README.md", "--font README.md cannot be read as a font"),
        ("--prompt a --animate x.gif --num-samples 17", "at most 16 sequences, but there are 17"),
        (
            "--prompt a fedcbafedcba --length 1 --batch-size 1",
            "prompt 2 of 2, 'fedcbafedcba', has 12 tokens; with an answer of 1 it",
        ),
        ("--prompt aé[MASK*2]", "'aé' has characters that the tokenizer does not know"),
        ("--prompt a a[MASK*12] --batch-size 1", "a text of 13 tokens exceeds the trained"),
        ("--prompt-file {tmp}/none.txt", "none.txt"),
        ("--prompt-file {tmp}/empty.txt", "empty.txt holds no prompt"),
        ("--prompt-file {tmp}/a.jsonl", "a.jsonl, line 1: no key 'prompt'; it has 'text'"),
        ("--prompt a --prompt-file {tmp}/empty.txt", "not allowed with"),
        ("--prompt a[MASK*2] --length 3", r"--length has no effect on texts with \[MASK\*N\]"),
        ("--prompt a \udcff", r"prompt 2, '\\udcff', is not UTF-8"),
        (f"--prompt a --seed {2**63}", "--seed is 9223372036854775808: give a whole number of 64 bits"),
        (f"--prompt a --seed {-(10**30)}", "give a whole number of 64 bits"),
        ("", "standard input is empty"),
    ],
)
def test_bad_input_is_one_line(
    call: Generate, tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr("sys.stdin", io.StringIO())
    done = call(*arguments.format(tmp=tmp_path).split())
    assert re.search(message, done.complaint())
    assert done.output == "", "nothing is decoded before all prompts are checked"


def test_spans() -> None:
    assert spans("a[MASK*2]b[MASK*10]") == ["a", 2, "b", 10]
    assert spans("a[MASK]b") == ["a[MASK]b"]
    assert spans(r"a\[MASK*3]b[MASK*2]") == ["a[MASK*3]b", 2]
    with pytest.raises(UserError, match="give the number of tokens"):
        spans("[MASK*]")


def test_pieces_of_a_run_are_its_text() -> None:
    """A character split into several tokens belongs to the last of them."""
    text = "é x漢字🙂!"
    tokens = list(text.encode())
    tokenizer = SimpleNamespace(
        mask=300, pad=301, eos=302, decode=lambda ids: bytes(ids).decode(errors="replace")
    )
    found = pieces(tokenizer, tokens)  # type: ignore[arg-type]
    assert found == [one if one != "_" else "" for one in "_é x__漢__字___🙂!"]
    apart = pieces(tokenizer, [*tokens[:4], 300, *tokens[4:], 302])  # type: ignore[arg-type]
    assert "".join(apart) == text
    assert (apart[4], apart[-1]) == ("", "")


def screen(written: str) -> list[str]:
    """Emulate a terminal: apply cursor-up and erase-below sequences, and return the lines on the screen."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]+m|\n|[^\x1b\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("F") and part.startswith("\x1b"):
            row -= int(part[2:-1])
            assert row >= 0
        elif part == "\x1b[0J":
            lines = [*lines[:row], ""]
        elif not part.startswith("\x1b"):
            lines[row] += part
    return lines


def test_a_terminal_shows_the_last_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines wrap by character width; control characters do not reach the terminal."""
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: SimpleNamespace(columns=7, lines=9))
    monkeypatch.setattr(terminal, "INTERVAL", 0.0)
    stream = io.StringIO("before\n")
    stream.seek(0, io.SEEK_END)
    view = terminal.LiveView(stream)
    given, mask = Cell("漢漢漢漢", None, False), Cell("", None, True)
    view.show({0: Frame(0, lambda: [given, mask, mask, mask]), 1: Frame(0, lambda: [mask])})
    assert screen(stream.getvalue()) == ["before", "漢漢漢", "漢░░░", "░", ""]
    view.show({0: Frame(1, lambda: [given, Cell("a\x1b[\n", 1, False), mask, mask])})
    assert screen(stream.getvalue()) == ["before", "漢漢漢", "漢a\ufffd[", "░░", "░", ""]
    view.show({2: Frame(2, lambda: [given])})  # the next batch
    assert screen(stream.getvalue()) == ["before", "漢漢漢", "漢", ""]
    view.clear()
    assert screen(stream.getvalue()) == ["before", ""]


def test_a_terminal_keeps_the_result_alone(call: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--prompt", "abc", "d[MASK*2]", "--length", "5")
    plain = call(*arguments).output
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    shown = call(*arguments).output
    assert "\x1b[" in shown
    assert screen(shown) == screen(plain)


def recorded(run_folder: Path, settings: SamplingSettings) -> tuple[list[list[Frame]], list[str]]:
    """Return the frames and texts of two samples."""
    loaded, recorder = load_model(run_folder, torch.device("cpu")), Recorder()
    samples = list(generate(loaded, ["ab[MASK*6]c", "fd"], settings, length=5, shows=[recorder.show]))
    return recorder.sequences(), [sample.text for sample in samples]


def test_a_page_replays_the_steps(run_folder: Path) -> None:
    """Replaying the page's data, as its script does, ends with the sampled text."""
    settings = SamplingSettings(steps=9, temperature=1.0, remasking="rescale", eta=0.8)
    frames, texts = recorded(run_folder, settings)
    match = re.search(r"const sequences = (.*);\n", page(frames))
    assert match is not None
    for sequence, steps, text in zip(json.loads(match.group(1)), frames, texts, strict=True):
        assert sequence["start"].count(None) in (5, 6)
        cells = sequence["start"]
        for one, frame in zip(sequence["frames"], steps, strict=True):
            for i, shown, _ in one["changes"]:
                cells[i] = shown
            assert cells[: one["length"]] == [None if c.masked else c.text for c in frame.cells]
        assert "".join(cells[: one["length"]]) == text
    assert page([[Frame(0, lambda: [Cell("</script>", 0, False)])]]).count("</script>") == 1


def test_a_gif_has_a_picture_a_step(run_folder: Path, tmp_path: Path) -> None:
    """Masks are grey boxes: the first picture has some, the last has none."""
    frames, _ = recorded(run_folder, SamplingSettings())
    path = tmp_path / "order.gif"
    write_animation(path, frames)
    with Image.open(path) as picture:
        assert picture.n_frames == max(map(len, frames)) + 1
        grey = []
        for number in (0, picture.n_frames - 1):
            picture.seek(number)
            counts = picture.convert("RGB").getcolors(maxcolors=2**20)
            assert counts is not None
            grey.append(sum(n for n, colour in counts if colour == (221, 221, 221)))
    assert grey[0] > 1000
    assert grey[1] < 100


def test_bytes_that_are_not_utf_8_on_standard_input(call: Generate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"abc\n\xff\n"), encoding="utf-8"))
    assert "standard input is not UTF-8 (byte 4)" in call().complaint()


def test_samples_that_are_alike_are_announced(call: Generate) -> None:
    outcome = call("--prompt", "a", "--num-samples", "2")
    assert outcome.code == 0
    assert outcome.error.startswith(
        "warning: --num-samples is 2, but at temperature 0 the samples of a prompt"
    )
    assert outcome.error.count("\n") == 1
    first, second = re.split(r"==> prompt 1, sample \d <==\n", outcome.output)[1:]
    assert first.strip() == second.strip() != ""
    for more in (["--temperature", "1"], ["--policy", "random"]):
        assert call("--prompt", "a", "--num-samples", "2", *more).error == ""

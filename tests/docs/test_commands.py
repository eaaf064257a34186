"""The commands of the README and of the pages, run as they stand there; only the work is made smaller."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from pipeline import train
from support.documents import blocks, commands, text_of, words
from support.forked import run_forked
from support.programs import ROOT, run_here

STEPS = """
    --train.steps 4 --train.global_batch_size 8 --train.micro_batch_size 4 --schedule.warmup_steps 1
    --schedule.decay_steps 0 --evaluation.samples 8
""".split()
Run = Callable[[str], str]

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a checkout, with the files that the pages read, after the quick start."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pipeline", "tools", "configs", "ds_configs", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = ["".join(random.choice(letters, random.integers(2, 9))) for _ in range(1000)]

    def write(name: str, count: int, record: Callable[[str], object]) -> None:
        texts = (" ".join(random.choice(vocabulary, 60)) + "." for _ in range(count))
        (folder / name).write_text("".join(json.dumps(record(text)) + "\n" for text in texts))

    write("corpus.jsonl", 200, lambda text: {"text": text})
    write("held_out.jsonl", 40, lambda text: {"text": text})
    write("pairs.jsonl", 20, lambda text: {"prompt": text[:20], "answer": text[20:40]})
    write("questions.jsonl", 8, lambda text: {"prompt": text[:20], "answer": text[20:30]})
    write("prompts.jsonl", 2, lambda text: {"prompt": text[:20]})
    chat = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "Two."}]
    pq.write_table(pa.table({"messages": [chat] * 4}), folder / "chats.parquet")
    Tokenizer(WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    quick_start(folder)
    return folder


def quick_start(folder: Path) -> None:
    """Run the README's quick start: its training on two ranks, the rest in this process."""
    lines = blocks(text_of("README.md"), "bash", "Quick start")[0].splitlines()
    activate, *rest = [line for line in lines if not line.startswith("#")]
    assert activate == "source .venv/bin/activate"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in rest:
            program, *arguments = words(command)
            if program == "python":
                tool(arguments[0])(arguments[1:] + smaller(arguments))
                continue
            arguments += STEPS if program == "torchrun" else ["--inspect"]  # tensorboard would serve for ever
            if program == "torchrun":
                result = run_forked("-m", "torch.distributed.run", *arguments, folder=folder)
            else:
                binary = str(Path(sys.executable).parent / program)
                result = subprocess.run([binary, *arguments], capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
            assert ("done: 4 steps" if program == "torchrun" else "train/loss") in result.stdout


def tool(path: str) -> Callable[[list[str]], int | None]:
    """Return the main function of a tool."""
    return importlib.import_module(f"tools.{Path(path).stem}").main


def smaller(command: list[str]) -> list[str]:
    """Return options that make the work of a tool smaller; behind others, they are the ones that count."""
    name = Path(command[0]).stem
    if name == "make_sudoku":
        return ["--count", "100"]
    if name == "train_tokenizer" and "--input" in command:
        return ["--vocab-size", "400"]
    if name == "evaluate":
        return ["--limit", "8", *(["--draws", "2"] if "likelihood" in command else ["--length", "16"])]
    if name == "generate" and "MASK" not in " ".join(command):
        return ["--length", "16"]
    return []


@pytest.fixture
def run(checkout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command in this process, in the checkout, by the plain engine."""
    monkeypatch.chdir(checkout)

    def run_command(command: str) -> str:
        program, *rest = words(command)
        assert program in ("python", "torchrun"), command
        if "pipeline.train" in rest:
            main, given = train.main, rest[rest.index("pipeline.train") + 1 :]
            given += ["--engine.kind", "plain", *STEPS]
        else:
            main, given = tool(rest[0]), rest[1:] + smaller(rest)
        outcome = run_here(main, given, capsys)
        assert outcome.code == 0, f"{command}\n{outcome.output}\n{outcome.error}"
        return outcome.output

    return run_command


def test_the_quick_start(checkout: Path) -> None:
    """It leaves a model, results and a report."""
    for made in ("exported/mine/model.safetensors", "report.html", "runs/mine/metrics.jsonl"):
        assert (checkout / made).is_file(), made


def test_the_chain_of_jobs(run: Run) -> None:
    """The submission of the README is planned; its status needs SLURM."""
    _, submit, _ = commands(text_of("README.md"), "Quick start")[-3:]
    assert "after success: pretrain" in run(f"{submit} --dry-run")


def test_plans(run: Run) -> None:
    for command in commands(text_of("docs/howto/gpu.md"), "Does it fit?"):
        assert "GiB" in run(command)


def test_prepare_data(run: Run, checkout: Path) -> None:
    """All but the commands for a folder of compressed files and for a cluster."""
    page = text_of("docs/howto/prepare_data.md")
    _, import_json, import_model = commands(page, "A tokenizer")
    assert "added" in run(import_json)
    shutil.copy("data/tokenizer/tokenizer.model", "tokenizer.model")
    assert "wrote data/imported_pieces: 400 tokens" in run(import_model)
    _, pairs, chats, *inspections = commands(page, "Text, pairs, chat")
    assert "20 documents" in run(pairs)
    assert "4 documents" in run(chats)
    assert [("0 faults" in run(command)) for command in inspections] == [False, True, False]
    assert (checkout / "lengths.png").is_file()


def test_blend(run: Run) -> None:
    """By temperature and with a limit; the start says what each dataset gives."""
    for name in ("web", "books"):
        run(f"python tools/preprocess_data.py --input held_out.jsonl --tokenizer data/tokenizer --workers 1 "
            f"--output-prefix data/{name}")  # fmt: skip
    *_, temperature = commands(text_of("docs/howto/blend.md"))
    assert re.search(r"data/web.*\n *data/books", run(temperature))


def test_another_run_from_the_weights(run: Run) -> None:
    for command in commands(text_of("docs/howto/resume.md"), "Start from weights alone"):
        printed = run(command)
    assert "done: 4 steps" in printed


def test_evaluate(run: Run, checkout: Path) -> None:
    likelihood, exact, *_ = commands(text_of("docs/howto/evaluate.md"))
    assert "nats" in run(likelihood)
    assert "of 8 items" in run(exact)
    assert len(json.loads((checkout / "runs/mine/evaluation/exact.json").read_text())["items"]) == 8


def test_generate(run: Run, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also from Python, as the page shows."""
    page = text_of("docs/howto/generate.md")
    printed = [run(command) for command in commands(page)]
    assert printed[0].startswith("Once upon a time")
    heads = [line for line in printed[1].splitlines() if line.startswith("==> ")]
    assert heads == [f"==> prompt 1, sample {number} <==" for number in (1, 2, 3, 4)]
    assert [json.loads(line)["sample"] for line in printed[2].splitlines()] == [0, 0]
    assert (checkout / "order.html").is_file()
    [program] = blocks(page, "python")
    exec(program, {})
    assert capsys.readouterr().out


def test_the_first_run(run: Run) -> None:
    """The tutorial from puzzles to a score."""
    page = text_of("docs/tutorials/first_run.md")
    for command in commands(page):
        if command.startswith(("python", "torchrun")):
            printed = run(command)
    assert len(printed.strip()) > 16


def test_the_two_commands_exist() -> None:
    """`make demo` and `make test` are targets of the Makefile."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert [words(command)[1] in targets for command in commands(text_of("README.md"), "Two commands")] == [
        True,
        True,
    ]


def test_the_map_exists() -> None:
    """Every path of the README's map is there."""
    readme = text_of("README.md")
    for path in re.findall(r"^\| (`.*?) \|", readme[readme.index("## Map") :], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", path):
            assert (ROOT / name).exists(), name

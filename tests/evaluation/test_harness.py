"""The model ``puma`` in the real lm-evaluation-harness, on local tasks, against sums over all masks."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}  # before the harness is imported

import pytest
import torch
from lm_eval.api.instance import Instance

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import Loaded, load_model
from pipeline.decoding.completing import complete
from pipeline.evaluation import harness
from pipeline.evaluation.harness_model import PumaLM, before_first
from pipeline.model.batch import masked_batch
from support.forked import LIBRARIES, run_forked, torchrun
from support.programs import run_program

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(run_dir: Path) -> Loaded:
    return load_model(run_dir, torch.device("cpu"))


def bound(loaded: Loaded, prompt: list[int], answer: list[int]) -> float:
    """Return the bound on -log p(answer | prompt): the mean over n of L/n times the mean masked NLL sum."""
    length = len(answer)
    total = 0.0
    for n in range(1, length + 1):
        places = torch.tensor(list(itertools.combinations(range(len(prompt), len(prompt) + length), n)))
        tokens = torch.tensor([prompt + answer]).repeat(len(places), 1)
        masked = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, places, True)
        with torch.no_grad():
            output = loaded.model(masked_batch(tokens, masked, masked.sum().item(), loaded.tokenizer.mask))
        total += float(output.nll.sum()) / len(places) / n
    return total


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, 0) for each in arguments]  # type: ignore[arg-type]


def test_likelihoods_are_sums_over_all_masks(loaded: Loaded, run_dir: Path) -> None:
    model, encode = PumaLM(str(run_dir)), loaded.tokenizer.encode
    pairs = [("ab", "ba"), ("f", "fgg"), ("cad", "x"), ("", "abc")]
    found = model.loglikelihood(requests("loglikelihood", *pairs))
    for (prompt, answer), (value, greedy) in zip(pairs, found, strict=True):
        ids = encode(prompt).tolist() or [loaded.tokenizer.eos]
        assert -value == pytest.approx(bound(loaded, ids, encode(answer).tolist()), rel=1e-5)
        [completion] = complete(loaded, [prompt], length=len(answer)) if prompt else [None]
        if completion is not None:
            assert greedy == (completion.tokens == encode(answer).tolist())
    greedy = complete(loaded, ["ab"], length=3)[0].text
    if len(greedy) == 3:
        assert model.loglikelihood(requests("loglikelihood", ("ab", greedy)))[0][1]


def test_long_texts_roll(loaded: Loaded, run_dir: Path) -> None:
    """Texts are scored in windows of 12 tokens with one token of context; long windows are estimated."""
    model = PumaLM(str(run_dir), draws=64)
    ids = loaded.tokenizer.encode("abcde").tolist()
    [value] = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("abcde",)))
    assert -value == pytest.approx(bound(loaded, [loaded.tokenizer.eos], ids), rel=1e-5)
    text = "abcdefabcdefabcd"  # 11 tokens, then 5
    whole = loaded.tokenizer.encode(text).tolist()
    expected = bound(loaded, [loaded.tokenizer.eos], whole[:11]) + bound(loaded, whole[10:11], whole[11:])
    [value] = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert -value == pytest.approx(expected, rel=0.1)
    assert [value] == model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))


def test_long_contexts_lose_their_beginning(loaded: Loaded, run_dir: Path) -> None:
    model = PumaLM(str(run_dir))
    long, short = "fedcba" * 3, "fedcba" * 3
    [one, two] = model.loglikelihood(requests("loglikelihood", (long, "ab"), (short[-10:], "ab")))
    assert one[0] == pytest.approx(two[0], rel=1e-6)
    with pytest.raises(UserError, match="13 tokens, which exceeds the trained sequence length 12"):
        model.loglikelihood(requests("loglikelihood", ("a", "b" * 13)))
    [text] = model.generate_until(requests("generate_until", (long, {"max_gen_toks": 4})))
    assert text == complete(loaded, [long[-8:]], length=4)[0].text


def test_answers_end_at_stop_strings(loaded: Loaded, run_dir: Path) -> None:
    whole = complete(loaded, ["ab", "f"], length=5)
    first = whole[0].text[1:2]
    found = PumaLM(str(run_dir)).generate_until(
        requests(
            "generate_until",
            ("ab", {"until": [first, "#"], "max_gen_toks": 5}),
            ("f", {"until": [], "max_gen_toks": 5}),
        )
    )
    assert found == [whole[0].text[: whole[0].text.index(first)] if first else whole[0].text, whole[1].text]
    assert before_first("one. two\nthree", ["\n", "."]) == "one"
    assert before_first("one", ["\n", ""]) == "one"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draw": 3}, "--model_args has unknown setting draw"),
        ({"batch_size": "auto"}, "--batch_size is auto"),
        ({"tokens_per_step": 0}, "tokens_per_step in --model_args is 0"),
        ({"temperature": "hot"}, "temperature in --model_args is hot: it must be a number"),
        ({"seed": True}, "seed in --model_args is True: it must be a whole number"),
        ({"verify": "no"}, "verify in --model_args is no: it must be true or false"),
        ({"weights": "best"}, "weights in --model_args is best: choose from ema, raw"),
        ({"draws": 3}, "draws in --model_args is 3: give an even number"),
        ({"checkpoint": "nowhere"}, "nowhere holds no checkpoint"),
        ({"checkpoint": ""}, "--model_args names no checkpoint: add checkpoint=RUN"),
    ],
)
def test_bad_arguments(run_dir: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PumaLM(**({"checkpoint": str(run_dir)} | arguments))


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval._cli", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(harness.__file__)), run_name="__main__")
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: pipeline.evaluation.harness needs lm_eval, ")
    assert "'puma-pipeline[eval]'" in error


WITHOUT_TORCH = """
import contextlib, io, json, sys
from pipeline.base import cli
from pipeline.evaluation import harness
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    with contextlib.suppress(SystemExit), contextlib.redirect_stderr(sys.stdout):
        cli.run(lambda _: harness.main())
print("torch" in sys.modules)
"""


def test_help_and_refusals_do_not_wait_for_torch() -> None:
    refused = {
        "--tasks x --model_args checkpoint=nowhere": "error: nowhere holds no checkpoint",
        "--tasks x --model_args checkpoint=a,chekpoint=b": "chekpoint: choose from",
        "--tasks x --model_args checkpoint=a,batch_size=3": "give it as --batch_size",
        '--tasks x --model_args {"checkpoint":': "error: Invalid JSON",
        "--config nowhere.yaml": "error: Config file not found: ",
        "--tasks x --limt 3": "unrecognized arguments: --limt 3",
    }
    commands = [["--help"], *(["--model", "puma", *each.split()] for each in refused)]
    result = run_program("-c", WITHOUT_TORCH, json.dumps(commands))
    assert "Language Model Evaluation Harness" in result.stdout, result.stderr
    *lines, has_torch = result.stdout.splitlines()
    for words in refused.values():
        assert sum(words in line for line in lines) == 1, words
    assert has_torch == "False"
    assert "Traceback" not in result.stdout


def write_tasks(loaded: Loaded, tmp_path: Path) -> list[dict[str, Any]]:
    """Write a multiple-choice and a generation task; return their items."""
    rows = [{"prompt": p, "choices": ["gg", p[::-1], "abc"], "label": 1} for p in ("ab", "fed", "ca", "ddd")]
    written = complete(loaded, [row["prompt"] for row in rows], length=4)
    for row, completion, keep in zip(rows, written, (True, True, True, False), strict=True):
        row["text"] = completion.text if keep else "?"
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/items.jsonl}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
    (tmp_path / "choice.yaml").write_text(
        f"task: local_choice\noutput_type: multiple_choice{common}doc_to_choice: choices\n"
        "doc_to_target: label\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        f"task: local_write\noutput_type: generate_until{common}doc_to_target: text\n"
        "generation_kwargs: {max_gen_toks: 4, until: []}\nmetric_list: [{metric: exact_match}]\n"
    )
    return rows


def test_the_harness_runs_local_tasks(loaded: Loaded, run_dir: Path, tmp_path: Path) -> None:
    """A multiple-choice and a generation task, through the harness's evaluation, by model name."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = write_tasks(loaded, tmp_path)
    found = simple_evaluate(
        model="puma",
        model_args=f"checkpoint={run_dir},check_greedy=false",
        batch_size=8,
        device="cuda:0",  # the default of the harness's command line, even without a GPU
        tasks=["local_choice", "local_write"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    encode = loaded.tokenizer.encode
    right = 0
    for row in rows:
        prompt = encode(row["prompt"]).tolist()
        bounds = [bound(loaded, prompt, encode(choice).tolist()) for choice in row["choices"]]
        right += bounds.index(min(bounds)) == row["label"]
    assert found is not None
    assert found["results"]["local_choice"]["acc,none"] == right / 4
    assert found["results"]["local_write"]["exact_match,none"] == 0.75


def test_two_ranks_find_what_one_finds(loaded: Loaded, run_dir: Path, tmp_path: Path) -> None:
    """Every answer and every likelihood, with noise; an error is one line."""
    write_tasks(loaded, tmp_path)
    command = ["-m", "pipeline.evaluation.harness", "--model", "puma", "--tasks", "local_choice,local_write"]
    command += ["--include_path", str(tmp_path), "--log_samples", "--batch_size", "3", "--output_path"]
    sampler = f"checkpoint={run_dir},draws=2,temperature=1"
    logs = []
    for ranks in (1, 2):
        output = tmp_path / str(ranks)
        outcome = run_forked(*command, str(output), "--model_args", sampler, ranks=ranks, by=LIBRARIES)
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.count("|local_choice|") == 1, "the first rank prints"
        paths = [
            path for task in ("choice", "write") for path in output.rglob(f"samples_local_{task}_*.jsonl")
        ]
        assert len(paths) == 2
        logs.append([json.loads(line) for path in paths for line in path.read_text().splitlines()])
    assert len(logs[0]) == 8
    for one, two in zip(*logs, strict=True):
        assert one["arguments"] == two["arguments"]
        assert as_numbers(one["filtered_resps"]) == pytest.approx(as_numbers(two["filtered_resps"]), rel=1e-4)
    nowhere = [*command, str(tmp_path / "3"), "--model_args", "checkpoint=nowhere"]
    outcome = run_program(*torchrun(2), *nowhere)
    assert outcome.returncode != 0
    assert outcome.stderr.count("error: nowhere holds no checkpoint") == 1


def as_numbers(responses: list[Any]) -> list[float]:
    """Return the likelihoods of choices, or the characters of a text."""
    if isinstance(responses[0], str):
        return [float(ord(character)) for character in responses[0]]
    return [float(value) for value, _ in responses]


def test_chat_templates(loaded: Loaded, run_dir: Path, tmp_path: Path) -> None:
    """What the harness shows the model is what the template writes; special tokens in it are those tokens."""
    end = loaded.tokenizer.model.token(loaded.tokenizer.eos)
    template = "{% for m in messages %}{{ m.content }}" + end + "{% endfor %}"
    template += "{% if add_generation_prompt %}g{% endif %}"
    (tmp_path / "c.jinja").write_text(template)
    model = PumaLM(str(run_dir), chat_template=str(tmp_path / "c.jinja"))
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    assert model.chat_template(True) == template
    assert model.apply_chat_template(chat) == f"ab{end}c{end}g"
    assert model.apply_chat_template(chat, add_generation_prompt=False) == f"ab{end}gc"
    encode, eos = loaded.tokenizer.encode, loaded.tokenizer.eos
    prompt = [*encode("ab").tolist(), eos, *encode("c").tolist(), eos, *encode("g").tolist()]
    assert model.tok_encode(f"ab{end}c{end}g") == prompt
    [(value, _)] = model.loglikelihood(requests("loglikelihood", (f"ab{end}c{end}g", "abc")))
    assert -value == pytest.approx(bound(loaded, prompt, encode("abc").tolist()), rel=1e-5)
    without = PumaLM(str(run_dir))
    assert without.tok_encode(end) == encode(end).tolist()
    with pytest.raises(UserError, match="--apply_chat_template: this model carries no chat template"):
        without.chat_template(True)
    (tmp_path / "c.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(UserError, match=r"refuses the messages \(no\): give another chat_template"):
        PumaLM(str(run_dir), chat_template=str(tmp_path / "c.jinja")).apply_chat_template(chat)

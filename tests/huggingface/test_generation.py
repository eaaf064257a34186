"""`generate` of exported code, by transformers alone in a fresh process, against our own decoding."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from pipeline.checkpoint.load_model import Loaded
from pipeline.decoding.completing import Completion, complete, infill
from pipeline.decoding.samples import generate
from pipeline.decoding.sampling import SamplingSettings
from pipeline.huggingface.remote_code.modeling_masked_diffusion import MaskedDiffusionForMaskedLM
from support.exports import LENGTH, export_random
from support.forked import LIBRARIES, run_forked
from support.programs import ROOT

pytestmark = pytest.mark.slow

MODELS: dict[str, dict[str, Any]] = {
    "whole": {},
    "whole, shifted": {"prediction": "shifted", "data_kind": "packed", "tie_embeddings": False},
    "blocks": {"objective": {"block_size": 3}, "qk_norm": True},
    "blocks, packed": {"objective": {"block_size": 4}, "data_kind": "packed", "prediction": "shifted"},
    "causal": {"objective": {"kind": "autoregressive"}, "prediction": "shifted"},
}
# Arguments of `generate`.
SETTINGS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "two a step": {"tokens_per_step": 2},
    "steps": {"steps": 3},
    "threshold": {"threshold": 0.4},
    "margin": {"policy": "margin", "tokens_per_step": 2},
    "entropy": {"policy": "entropy"},
    "random": {"policy": "random", "seed": 5},
    "left to right": {"policy": "left_to_right"},
    "drawn": {"temperature": 1.0, "seed": 3},
    "drawn by threshold": {"threshold": 0.3, "temperature": 0.7},
    "drawn by margin": {"policy": "margin", "temperature": 1.5},
    "drawn by entropy": {"policy": "entropy", "temperature": 2.0},
    "drawn at random": {"policy": "random", "temperature": 1.0},
    "top k": {"temperature": 1.0, "top_k": 3},
    "top p": {"temperature": 1.0, "top_p": 0.6},
    "cap": {"tokens_per_step": 2, "temperature": 1.0, "remasking": "cap", "eta": 0.3},
    "rescale": {"steps": 9, "temperature": 1.0, "remasking": "rescale", "eta": 0.8},
    "no cache": {"use_cache": False, "temperature": 1.0},
}
IN_BLOCKS = {"block_length": 3, "tokens_per_step": 2}
OURS = {"block_length": "block_size", "use_cache": "cache"}  # what the sampler's settings are called here
PROMPTS = ["abc", "f", "gfedcba", "ba"]
GAPS = [["ab", 3, "c", 1], ["g", 2]]


@dataclass
class Case:
    """What one call of `generate` gives, and what it is to give."""

    texts: list[str]
    side: str
    arguments: dict[str, Any]
    expected: list[Completion]


def cases_of(loaded: Loaded) -> dict[str, Case]:
    settings = dict(SETTINGS)
    whole = loaded.layout.attention == "bidirectional"
    if whole:
        settings["in blocks"] = IN_BLOCKS
    found = {}
    for number, (name, given) in enumerate(settings.items()):
        ours = SamplingSettings(**{OURS.get(key, key): value for key, value in given.items()})
        expected = complete(loaded, PROMPTS, ours, 8)
        found[name] = Case(PROMPTS, ["left", "right"][number % 2], {"max_new_tokens": 8, **given}, expected)
    found["to the end"] = Case(PROMPTS, "left", {}, complete(loaded, PROMPTS))
    drawn = {"temperature": 1.0, "seed": 2}
    samples = list(generate(loaded, PROMPTS, SamplingSettings(**drawn), samples=2, length=6))
    texts = [sample.prompt for sample in samples]
    arguments = {"max_new_tokens": 6, **drawn}
    found["samples"] = Case(texts, "right", arguments, [sample.completion for sample in samples])
    if whole:
        mask = loaded.tokenizer.model.token(loaded.tokenizer.mask)
        texts = ["".join(p if isinstance(p, str) else mask * p for p in pieces) for pieces in GAPS]
        found["gaps"] = Case(texts, "left", drawn, infill(loaded, GAPS, SamplingSettings(**drawn)))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[Loaded, Case, Any]]]:
    """Return model, case and result of every call, by names of model and case."""
    place = tmp_path_factory.mktemp("generation")
    models = {name: export_random(place / str(i), **shape) for i, (name, shape) in enumerate(MODELS.items())}
    cases = {name: cases_of(loaded) for name, loaded in models.items()}
    calls = [
        [str(place / str(number)), case.texts, case.side, case.arguments]
        for number, of_model in enumerate(cases.values())
        for case in of_model.values()
    ]
    (place / "cases.json").write_text(json.dumps(calls))
    program = str(ROOT / "tests/support/generate_with_export.py")
    done = run_forked(program, str(place / "found.json"), str(place / "cases.json"), by=LIBRARIES)
    assert done.returncode == 0, done.stderr
    found = iter(json.loads((place / "found.json").read_text()))
    return {
        name: {case: (models[name], one, next(found)) for case, one in of_model.items()}
        for name, of_model in cases.items()
    }


@pytest.mark.parametrize("model", MODELS)
def test_token_by_token_as_our_own_decoding(model: str, results: dict[str, Any]) -> None:
    """For every policy, drawn or not, with prompts of different lengths, padded on either side."""
    assert len(results[model]) >= len(SETTINGS) + 1
    for name, (loaded, case, found) in results[model].items():
        if name == "gaps":
            continue
        assert found["inputs"], "the prompts come back as they were"
        assert found["steps"] == [one.steps for one in case.expected], name
        pad = loaded.tokenizer.pad
        for tokens, order, one in zip(found["tokens"], found["order"], case.expected, strict=True):
            more = len(tokens) - len(one.tokens)
            assert tokens == one.tokens + [pad] * more, name
            assert order == one.order + [-1] * more, name
    answers = [found["tokens"] for _, _, found in results[model].values()]
    assert len({str(answer) for answer in answers}) > len(SETTINGS) / 3, "the settings make a difference"


@pytest.mark.parametrize("model", ["whole", "whole, shifted"])
def test_mask_tokens_in_a_text_are_filled_in(model: str, results: dict[str, Any]) -> None:
    _, case, found = results[model]["gaps"]
    assert found["steps"] == [one.steps for one in case.expected]
    for tokens, order, one in zip(found["tokens"], found["order"], case.expected, strict=True):
        filled = [(token, step) for token, step in zip(tokens, order, strict=True) if step >= 0]
        assert filled == list(zip(one.tokens, one.order, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported model that sees everything."""
    place = tmp_path_factory.mktemp("export") / "mine"
    export_random(place)
    return place


def test_defaults_are_those_of_the_folder(folder: Path) -> None:
    """generation_config.json, changed in memory, saved and loaded again."""
    model = MaskedDiffusionForMaskedLM.from_pretrained(folder)
    prompts = torch.tensor([[4, 5, 6], [7, 8, 9]])
    assert model.generate(prompts).shape[1] == LENGTH
    options = {"max_new_tokens": 5, "temperature": 1.5, "policy": "random", "seed": 4, "top_k": 4}
    expected = model.generate(prompts, **options)
    assert not expected.equal(model.generate(prompts, max_new_tokens=5))
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    assert model.generate(input_ids=prompts).equal(expected)
    model.save_pretrained(folder.parent / "again")
    again = MaskedDiffusionForMaskedLM.from_pretrained(folder.parent / "again")
    assert again.generate(prompts).equal(expected)
    greedy = again.generate(prompts, temperature=0.0, policy="confidence")
    assert greedy.equal(
        MaskedDiffusionForMaskedLM.from_pretrained(folder).generate(prompts, max_new_tokens=5)
    )
    config = GenerationConfig(max_new_tokens=5, do_sample=False, temperature=1.5)
    assert again.generate(prompts, config).equal(greedy)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_beams": 2}, TypeError, "no setting num_beams: it has max_new_tokens, policy, tokens_per_step"),
        ({"top_k": 3}, ValueError, "top_k is 3: it has no effect at temperature 0: set the temperature"),
        ({"steps": 2, "threshold": 0.5}, ValueError, "leave out tokens_per_step and threshold"),
        ({"block_length": 0}, ValueError, "block_length is 0: it must be 1 or more"),
        (
            {"remasking": "low_confidence"},
            ValueError,
            "remasking is low_confidence: choose from cap, rescale",
        ),
        ({"max_new_tokens": 14}, ValueError, "3 tokens; with an answer of 14 it does not fit .* length 16"),
        ({"max_new_tokens": 0}, ValueError, "with an answer of at least 1 it does not fit"),
        ({"inputs": None}, ValueError, r"the token ids of the prompts, \[B, P\]"),
        (
            {"inputs": [[4, 3, 3]], "max_new_tokens": 2},
            ValueError,
            "max_new_tokens is 2, but mask tokens are",
        ),
    ],
)
def test_what_is_refused(
    folder: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = MaskedDiffusionForMaskedLM.from_pretrained(folder)
    inputs = arguments.pop("inputs", [[4, 5, 6]])
    with pytest.raises(error, match=message):
        model.generate(None if inputs is None else torch.tensor(inputs), **arguments)


def test_what_a_model_in_blocks_refuses(tmp_path: Path) -> None:
    export_random(tmp_path / "mine", {"block_size": 3}, prediction="shifted")
    model = MaskedDiffusionForMaskedLM.from_pretrained(tmp_path / "mine")
    with pytest.raises(ValueError, match="block_length is 2, but the model was trained in blocks"):
        model.generate(torch.tensor([[4]]), block_length=2)
    with pytest.raises(ValueError, match="does not see the text after them"):
        model.generate(torch.tensor([[4, 3, 5]]))
    with pytest.raises(ValueError, match="begin with at least one given token"):
        model.generate(torch.tensor([[4]]), attention_mask=torch.tensor([[0]]))

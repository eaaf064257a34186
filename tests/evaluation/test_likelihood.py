"""The bound on the likelihood against enumeration of all masks, and against known distributions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.base.errors import UserError
from pipeline.checkpoint.load_model import load_model
from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.evaluation.likelihood import estimate, likelihood_of, likelihood_totals, score_answers
from pipeline.model.batch import HeadOutput, MaskedBatch, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from support.joints import FIRST, MASK, Joint, evaluator
from support.programs import Outcome

LENGTH = 5


def everything(joint: Joint, prompt: int = 0) -> Examples:
    """Return sequences of the joint distribution whose first `prompt` tokens are given."""
    tokens = torch.tensor(list(itertools.product(range(FIRST, FIRST + joint.size), repeat=joint.length)))[::7]
    roles = torch.where(torch.arange(joint.length) < prompt, PROMPT, ANSWER).expand_as(tokens)
    return Examples(tokens, roles, torch.arange(len(tokens)))


@pytest.mark.parametrize("prompt", [0, 2])
@pytest.mark.parametrize(
    "layout",
    [Whole(MASK, False), Blocks(MASK, False, size=2), Blocks(MASK, False, size=3), LeftToRight(MASK, False)],
    ids=["whole", "blocks-of-2", "blocks-of-3", "left-to-right"],
)
def test_an_exact_model_has_the_likelihood_itself(layout: Whole, prompt: int) -> None:
    """With all masks, the bound of an exact model equals -log p(answer | prompt), for every layout."""
    joint = Joint(3, LENGTH)
    examples = everything(joint, prompt)
    found = estimate(evaluator(joint), layout, examples, 1, draws=32, batch_size=50)
    for tokens, nll, error in zip(examples.tokens.numpy(), found.nll, found.standard_error, strict=True):
        whole, given = joint.probability(tokens, range(LENGTH)), joint.probability(tokens, range(prompt))
        assert float(nll) == pytest.approx(-math.log(whole / given), abs=1e-5)
        assert float(error) == 0
    assert found.tokens.tolist() == [LENGTH - prompt] * len(found.tokens)


def test_a_beginning_inside_a_block_is_given() -> None:
    """In packed text, with blocks from the start, some positions are scored given the others."""
    joint = Joint(3, LENGTH)
    examples = everything(joint)
    scored = (torch.arange(LENGTH) >= 3).expand_as(examples.tokens)
    layout = Blocks(MASK, False, size=2)
    found = estimate(evaluator(joint), layout, examples, 1, draws=8, scored=scored)
    for tokens, nll in zip(examples.tokens.numpy(), found.nll, strict=True):
        whole, given = joint.probability(tokens, range(LENGTH)), joint.probability(tokens, range(3))
        assert float(nll) == pytest.approx(-math.log(whole / given), abs=1e-5)
    assert found.tokens.tolist() == [2] * len(found.tokens)


def test_the_bound_of_a_network_equals_all_its_masks() -> None:
    """Rows with prompts, padding and different lengths, against a float64 sum over every mask."""
    torch.manual_seed(0)
    config = ModelConfig(layers=2, hidden_size=32, heads=4, intermediate_size=48, init_std=0.4)
    model = MaskedDiffusionModel(config, Vocabulary(12, 12, 3)).eval()
    tokens = torch.randint(4, 12, (3, 8))
    roles = torch.full((3, 8), ANSWER)
    roles[0, :3], roles[1, :5], roles[1, 6:], roles[2, 6:] = PROMPT, PROMPT, PADDING, PADDING
    found = estimate(model, Whole(3, True), Examples(tokens, roles, torch.arange(3)), 1, draws=64)
    for row in range(3):
        answer = [i for i in range(8) if roles[row, i] == ANSWER]
        total = 0.0
        for n in range(1, len(answer) + 1):
            subsets = list(itertools.combinations(answer, n))
            for subset in subsets:
                ids = tokens[row].clone()
                ids[list(subset)] = 3
                present = None if row == 0 else (roles[row] != PADDING)[None]
                logits = model.logits(ids[None], torch.tensor(subset), present).double()
                p = logits.softmax(-1)[range(n), tokens[row, list(subset)]]
                total -= float(p.log().sum()) / n / len(subsets)
        assert float(found.nll[row]) == pytest.approx(total, rel=1e-5)


def test_left_to_right_is_the_chain_rule() -> None:
    """The likelihood of a causal network equals one forward per prefix."""
    torch.manual_seed(1)
    config = ModelConfig(layers=2, hidden_size=32, heads=4, init_std=0.4, prediction="shifted")
    model = MaskedDiffusionModel(config, Vocabulary(12, 12, 3)).eval()
    tokens = torch.randint(4, 12, (2, 7))
    roles = torch.where(torch.arange(7) < torch.tensor([[3], [0]]), PROMPT, ANSWER)
    found = estimate(model, LeftToRight(3, False, True), Examples(tokens, roles, torch.arange(2)), 1)
    for row, first in enumerate([3, 1]):  # position 0 is never predicted
        total = 0.0
        for i in range(first, 7):
            causal = LeftToRight(3, False, True).decoding(Examples(tokens[:1, :i], roles, torch.zeros(1)))
            with torch.no_grad():
                hidden = model.model(tokens[row : row + 1, :i], None, causal)[0, -1:]
                p = model.lm_head.logits(hidden).double().softmax(-1)[0, tokens[row, i]]
            total -= float(p.log())
        assert float(found.nll[row]) == pytest.approx(total, rel=1e-5)
        assert found.tokens[row] == 7 - first


class Table:
    """A table of random NLLs by mask: a model without structure, whose bound is one sum."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.nll = np.random.default_rng(0).exponential(size=(2**length, length))

    def __call__(self, batch: MaskedBatch) -> HeadOutput:
        """Return the NLLs of the rows."""
        bits = 2 ** np.arange(self.length)
        masks = (batch.input_ids == MASK).numpy() @ bits
        rows = batch.rows.numpy()
        nll = torch.tensor(self.nll[masks[rows // self.length], rows % self.length], dtype=torch.float32)
        return HeadOutput(nll.sum(), nll, nll)

    def bound(self) -> float:
        """Return the mean over n of the mean over masks of n positions of L/n times their NLLs."""
        total = 0.0
        for n in range(1, self.length + 1):
            subsets = list(itertools.combinations(range(self.length), n))
            sums = [self.nll[sum(2**i for i in subset), list(subset)].sum() for subset in subsets]
            total += np.mean(sums) / n
        return total


@pytest.mark.parametrize("draws", [4, 6, 12, 20], ids=["stratified", "each-once", "each-twice", "uneven"])
def test_estimates_are_unbiased_and_know_their_error(draws: int) -> None:
    """The mean of 400 estimates is the bound; the standard error is their spread or slightly more."""
    length, count = 6, 400
    table = Table(length)
    tokens = torch.full((count, length), FIRST)
    examples = Examples(tokens, torch.full_like(tokens, ANSWER), torch.arange(count))
    found = estimate(table, Whole(MASK, False), examples, 1, draws, batch_size=1000)
    spread = float(found.nll.std())
    assert abs(float(found.nll.mean()) - table.bound()) < 4 * spread / math.sqrt(count)
    assert spread > 0.05
    assert 0.9 * spread < float(found.standard_error.square().mean().sqrt()) < 2 * spread


def test_nothing_depends_on_the_batch() -> None:
    length = 9
    tokens = torch.full((5, length), FIRST)
    examples = Examples(tokens, torch.full_like(tokens, ANSWER), torch.arange(5))
    whole = estimate(Table(length), Whole(MASK, False), examples, 1, draws=10, batch_size=50)
    for i in range(5):
        one = Examples(tokens[i : i + 1], examples.roles[i : i + 1], examples.ids[i : i + 1])
        alone = estimate(Table(length), Whole(MASK, False), one, 1, draws=10, batch_size=3)
        assert alone.nll.item() == pytest.approx(whole.nll[i].item(), rel=1e-12)
        assert alone.standard_error.item() == pytest.approx(whole.standard_error[i].item(), rel=1e-12)
    assert len(set(whole.nll.tolist())) == 5
    with pytest.raises(UserError, match="draws is 3: give an even number"):
        estimate(Table(length), Whole(MASK, False), examples, 1, draws=3)


@pytest.mark.parametrize(("prediction", "last"), [("same", 4), ("shifted", 3)])
def test_answers_of_a_trained_model(
    train: Callable[..., Outcome], tmp_path: Path, prediction: str, last: int
) -> None:
    """Scores keep the order of the pairs and do not depend on the batch; short answers are exact.

    With shifted prediction, the first token of an answer without a prompt is neither scored nor counted in
    bytes.
    """
    settings = "--train.steps", "4", "--schedule.warmup_steps", "1", "--model.prediction", prediction
    assert train(tmp_path, *settings).code == 0
    loaded = load_model(tmp_path, torch.device("cpu"))
    encode = loaded.tokenizer.encode_batch
    texts = [("abc", "cba"), ("f", "fgggffgg"), ("deba", "a"), ("", "abcd")]
    pairs = [(a.tolist(), b.tolist()) for a, b in zip(*map(encode, zip(*texts, strict=True)), strict=True)]
    scores = score_answers(loaded, pairs, draws=20, batch_size=16)
    assert [score.tokens for score in scores] == [3, 8, 1, last]
    assert [score.bytes for score in scores] == [3, 8, 1, last]
    assert [score.standard_error == 0 for score in scores] == [True, False, True, True]
    again = score_answers(loaded, pairs, draws=20, batch_size=3)
    for one, two in zip(scores, again, strict=True):
        assert one.nll == pytest.approx(two.nll, rel=1e-5)
    with pytest.raises(UserError, match="at most 12 in all, the trained"):
        score_answers(loaded, [([5] * 7, [5] * 6)])


def test_totals_of_several_ranks() -> None:
    """Perplexity, bits per byte and the standard error from sums added over ranks."""
    nll, tokens, text_bytes = (
        torch.tensor([3.0, 5.0, 10.0]),
        torch.tensor([2, 2, 5]),
        torch.tensor([8, 4, 20]),
    )
    parts = [likelihood_totals(*(x[i] for x in (nll, tokens, text_bytes))) for i in (slice(1), slice(1, 3))]
    found = likelihood_of(parts[0] + parts[1])
    assert found.nll == pytest.approx(6.0)
    assert found.standard_error == pytest.approx(np.std([3, 5, 10], ddof=1) / math.sqrt(3))
    assert found.perplexity == pytest.approx(math.exp(18 / 9))
    assert found.bits_per_byte == pytest.approx(18 / math.log(2) / 32)
    assert found.sequences == 3

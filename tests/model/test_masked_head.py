"""The masked head against full-logit cross-entropy in float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from pipeline.model import masked_head
from pipeline.model.batch import HeadOutput, Vocabulary
from pipeline.model.masked_head import MaskedHead
from support import oracles

ROWS, WIDTH, SIZE, MASK, TOKENS = 23, 16, 40, 3, 37
VOCABULARY = Vocabulary(SIZE, TOKENS, MASK)
FORBIDDEN = [MASK, *range(TOKENS, SIZE)]
SCORES = ("margin", "entropy")


@dataclass
class Case:
    """Inputs of a head, its results and those of the oracle."""

    output: HeadOutput
    hidden: torch.Tensor
    weight: torch.Tensor
    expected: oracles.HeadResult


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return hidden, weight, targets and weights; one target has a very low logit."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(SIZE, WIDTH, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(4, TOKENS, (rows,), generator=random)
    return hidden, weight, targets, torch.rand(rows, generator=random)


def run(rows: int = ROWS, dtype: torch.dtype = torch.float32, scores: tuple[str, ...] = SCORES) -> Case:
    """Return the head's output after a backward pass of twice its loss, and the oracle's."""
    hidden, weight, targets, weights = inputs(rows, dtype)
    asked = (*scores, "likeliest")
    output = HeadOutput(*masked_head._MaskedLoss.apply(hidden, weight, targets, weights, VOCABULARY, asked))
    (2 * output.loss).backward()
    arrays = [x.detach().double().numpy() for x in (hidden, weight)]
    expected = oracles.full_logit_head(*arrays, targets.numpy(), weights.double().numpy(), FORBIDDEN)
    return Case(output, hidden, weight, expected)


def check(case: Case, rtol: float = 1e-5, gradient_tolerance: float = 1e-6) -> None:
    """Compare everything with the oracle."""
    output, expected = case.output, case.expected
    assert output.loss.item() == pytest.approx(expected.loss, rel=rtol)
    for name in ("nll", "confidence", *SCORES):
        values = getattr(output, name)
        assert values.dtype == torch.float32
        assert not values.requires_grad
        np.testing.assert_allclose(values, getattr(expected, name), rtol=rtol, atol=1e-6, err_msg=name)
    assert output.likeliest is not None
    np.testing.assert_array_equal(output.likeliest, expected.likeliest)
    for gradient, wanted in [
        (case.hidden.grad, expected.grad_hidden),
        (case.weight.grad, expected.grad_weight),
    ]:
        assert gradient is not None
        np.testing.assert_allclose(gradient.float(), 2 * wanted, rtol=1e-4, atol=gradient_tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
def test_equals_full_logits(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    """Loss, NLL, every score and both gradients, in one chunk or many."""
    monkeypatch.setattr(masked_head, "CHUNK_LOGITS", SIZE * chunk_rows)
    check(run())


def test_scores_are_there_only_when_asked_for() -> None:
    """Margin and entropy are computed on request only, and change no other result."""
    plain, full = run(scores=()), run()
    assert plain.output.margin is None
    assert plain.output.entropy is None
    assert run(scores=("margin",)).output.entropy is None
    for name in ("loss", "nll", "confidence"):
        assert getattr(plain.output, name).equal(getattr(full.output, name))
    assert plain.weight.grad is not None
    assert plain.weight.grad.equal(full.weight.grad)  # type: ignore[arg-type]


def test_no_rows() -> None:
    """A rank without masked positions runs the head with loss 0 and zero gradients."""
    case = run(rows=0)
    assert case.output.loss.item() == 0
    for name in ("nll", "confidence", *SCORES):
        assert getattr(case.output, name).shape == (0,)
    assert case.weight.grad is not None
    assert not case.weight.grad.any()


def test_bf16_weights_give_fp32_scores() -> None:
    """bf16 inputs give the scores of fp32 logits; only the final gradients are rounded to bf16.

    Logits rounded to bf16 would be wrong in the third digit, with ties between confidences.
    """
    check(run(dtype=torch.bfloat16), rtol=1e-5, gradient_tolerance=0.05)


def test_autocast_keeps_fp32_logits() -> None:
    """Autocast does not round the logits to bf16; on a CPU the operands stay fp32, too."""
    hidden, weight, targets, weights = inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        head = MaskedHead(torch.nn.Parameter(weight), VOCABULARY)
        output = head(hidden, targets, weights)
        logits = head.logits(hidden)
    arrays = [x.detach().double().numpy() for x in (hidden, weight)]
    expected = oracles.full_logit_head(*arrays, targets.numpy(), weights.double().numpy(), FORBIDDEN)
    np.testing.assert_allclose(output.nll, expected.nll, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits.softmax(-1).amax(-1), expected.confidence, rtol=1e-5)


def test_mask_and_padding_rows_are_never_predicted() -> None:
    """Very high logits of these rows change neither loss, confidence nor gradients."""
    weight = torch.zeros(SIZE, WIDTH)
    weight[FORBIDDEN] = 100.0
    head = MaskedHead(torch.nn.Parameter(weight), VOCABULARY)
    output = head(torch.ones(2, WIDTH), torch.tensor([5, 6]), torch.tensor([0.5, 0.5]), SCORES)
    output.loss.backward()
    allowed = SIZE - len(FORBIDDEN)
    assert output.loss.item() == pytest.approx(np.log(allowed))
    np.testing.assert_allclose(output.confidence, 1 / allowed, rtol=1e-6)
    np.testing.assert_allclose(output.margin, 0, atol=1e-7)
    np.testing.assert_allclose(output.entropy, np.log(allowed), rtol=1e-6)
    assert not head.weight.grad[FORBIDDEN].any()
    assert (head.logits(torch.ones(1, WIDTH))[0, FORBIDDEN] == -torch.inf).all()


def test_a_second_backward_is_refused() -> None:
    """The backward scales gradients in place, so a second one would be wrong."""
    hidden, weight, targets, weights = inputs()
    loss = MaskedHead(torch.nn.Parameter(weight.detach()), VOCABULARY)(hidden, targets, weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()

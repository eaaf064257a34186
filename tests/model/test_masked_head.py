"""The masked head against full-logit cross-entropy in float64."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

from pipeline.model import masked_head
from pipeline.model.batch import Vocabulary
from pipeline.model.masked_head import MaskedHead

ROWS, WIDTH, SIZE, MASK, TOKENS = 23, 16, 40, 3, 37
VOCABULARY = Vocabulary(SIZE, TOKENS, MASK)
FORBIDDEN = [MASK, *range(TOKENS, SIZE)]


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """Return hidden, weight, targets and weights; one target's logit is far below the highest."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=random).to(dtype).requires_grad_()
    weight = torch.randn(SIZE, WIDTH, generator=random).to(dtype).requires_grad_()
    targets = torch.randint(4, TOKENS, (rows,), generator=random)
    return hidden, weight, targets, torch.rand(rows, generator=random)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
def test_equals_full_logits(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    """Loss, NLL, confidence and both gradients, in one chunk or many."""
    monkeypatch.setattr(masked_head, "CHUNK_LOGITS", SIZE * chunk_rows)
    hidden, weight, targets, weights = inputs()
    loss, nll, confidence = masked_head._MaskedLoss.apply(hidden, weight, targets, weights, VOCABULARY)
    (2 * loss).backward()
    arrays = [x.detach().double().numpy() for x in (hidden, weight)] + [
        targets.numpy(),
        weights.double().numpy(),
    ]
    expected = oracles.full_logit_loss(*arrays, FORBIDDEN)
    assert loss.item() == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(nll, expected[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(confidence, expected[2], rtol=1e-5)
    np.testing.assert_allclose(hidden.grad, 2 * expected[3], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(weight.grad, 2 * expected[4], rtol=1e-4, atol=1e-6)
    assert not nll.requires_grad
    assert not confidence.requires_grad


def test_no_rows() -> None:
    """A rank without masked positions still runs the head, with a loss of 0 and gradients of 0."""
    hidden, weight, targets, weights = inputs(rows=0)
    loss, nll, confidence = masked_head._MaskedLoss.apply(hidden, weight, targets, weights, VOCABULARY)
    loss.backward()
    assert loss.item() == 0
    assert nll.shape == confidence.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()


def test_mask_and_padding_rows_are_never_predicted() -> None:
    """Where their logits would be the highest by far, loss and confidence do not notice, nor do gradients."""
    weight = torch.zeros(SIZE, WIDTH)
    weight[FORBIDDEN] = 100.0
    head = MaskedHead(torch.nn.Parameter(weight), VOCABULARY)
    loss, _, confidence = head(torch.ones(2, WIDTH), torch.tensor([5, 6]), torch.tensor([0.5, 0.5]))
    loss.backward()
    allowed = SIZE - len(FORBIDDEN)
    assert loss.item() == pytest.approx(np.log(allowed))
    np.testing.assert_allclose(confidence, 1 / allowed, rtol=1e-6)
    assert not head.weight.grad[FORBIDDEN].any()
    assert (head.logits(torch.ones(1, WIDTH))[0, FORBIDDEN] == -torch.inf).all()


def test_bf16_weights_give_fp32_scores() -> None:
    """Loss and confidence of bf16 inputs are those of the rounded inputs to bf16's products' accuracy."""
    hidden, weight, targets, weights = inputs(dtype=torch.bfloat16)
    loss, nll, confidence = masked_head._MaskedLoss.apply(hidden, weight, targets, weights, VOCABULARY)
    loss.backward()
    arrays = [x.detach().double().numpy() for x in (hidden, weight)] + [
        targets.numpy(),
        weights.double().numpy(),
    ]
    expected = oracles.full_logit_loss(*arrays, FORBIDDEN)
    assert loss.dtype == nll.dtype == confidence.dtype == torch.float32
    np.testing.assert_allclose(nll, expected[1], atol=0.1)
    assert weight.grad is not None
    np.testing.assert_allclose(weight.grad.float(), expected[4], atol=0.05)

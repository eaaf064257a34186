"""The masked head against full-logit cross-entropy in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from pipeline.base.errors import UserError
from pipeline.model import masked_head
from pipeline.model.batch import HeadOutput, Vocabulary
from pipeline.model.masked_head import HeadOptions, MaskedHead, chunk_rows
from pipeline.planning.activations import head_memory
from pipeline.planning.live_memory import LiveStorages
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
    output = HeadOutput(*masked_head._MaskedLoss.apply(hidden, weight, targets, weights, VOCABULARY, scores))
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
    for gradient, wanted in [
        (case.hidden.grad, expected.grad_hidden),
        (case.weight.grad, expected.grad_weight),
    ]:
        assert gradient is not None
        np.testing.assert_allclose(gradient.float(), 2 * wanted, rtol=1e-4, atol=gradient_tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 5, 23, 100])
def test_equals_full_logits(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    """Loss, NLL, every score and both gradients, in one chunk or many."""
    monkeypatch.setattr(masked_head, "chunk_rows", lambda *_: chunk_rows)
    check(run())


def test_chunks_are_sized_for_the_card() -> None:
    """Logits and their bf16 gradients of a chunk take up to 1/32 of a GPU, in multiples of 128 rows."""
    for memory, vocabulary in ((79 * 2**30, 151_648), (79 * 2**30, 32_000), (16 * 2**30, 128_256)):
        rows = masked_head.chunk_rows(vocabulary, memory)
        assert rows % 128 == 0
        assert 6 * rows * vocabulary <= memory / 32 < 6 * (rows + 128) * vocabulary
    assert masked_head.chunk_rows(151_648, None) == 384, "on a CPU 2^26 logits"
    assert masked_head.chunk_rows(10**9, 2**30) == 128


@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_without_gradients_none_are_computed(monkeypatch: pytest.MonkeyPatch, chunk_rows: int) -> None:
    """An evaluation has one product a chunk, and the results of training."""
    monkeypatch.setattr(masked_head, "chunk_rows", lambda *_: chunk_rows)
    hidden, weight, targets, weights = inputs()
    head = MaskedHead(torch.nn.Parameter(weight.detach()), VOCABULARY)
    trained = head(hidden, targets, weights, SCORES)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        evaluated = head(hidden, targets, weights, SCORES)
    assert counter.get_total_flops() == 2 * ROWS * SIZE * WIDTH
    assert trained.loss.requires_grad
    assert not evaluated.loss.requires_grad
    for name in ("loss", "nll", "confidence", *SCORES):
        assert getattr(evaluated, name).equal(getattr(trained, name)), name


@pytest.mark.parametrize("row_multiple", [1, 12])
@pytest.mark.parametrize("chunk_rows", [5, 100])
def test_tokens_are_drawn_from_the_logits_of_their_rows(
    monkeypatch: pytest.MonkeyPatch, chunk_rows: int, row_multiple: int
) -> None:
    """Rows that pad a chunk draw nothing."""
    monkeypatch.setattr(masked_head, "chunk_rows", lambda *_: chunk_rows)
    hidden, weight, targets, weights = (x.detach() for x in inputs())
    head = MaskedHead(torch.nn.Parameter(weight), VOCABULARY)
    head.options = HeadOptions(row_multiple=row_multiple)
    noise = torch.randn(ROWS, SIZE, generator=torch.Generator().manual_seed(1)) * 3
    with torch.no_grad():
        output = head(
            hidden, targets, weights, (), lambda logits, part: (logits + noise[part]).argmax(dim=-1)
        )
        plain = head(hidden, targets, weights)
    assert output.nll.equal(plain.nll)
    assert plain.drawn is None
    logits = hidden.double() @ weight.double().T
    logits[:, FORBIDDEN] = -torch.inf
    assert output.drawn is not None
    np.testing.assert_array_equal(output.drawn, (logits + noise).argmax(dim=-1))


@pytest.mark.parametrize("adds", [True, False], ids=["addmm", "mm-and-add"])
def test_products_of_bf16_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, adds: bool) -> None:
    """The operands stay bf16 and the results are fp32, with products that stand in for a GPU's."""
    mm, addmm, seen = torch.mm, torch.addmm, []

    def in_fp32(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype, out: Any = None) -> torch.Tensor:
        assert (a.dtype, b.dtype, out_dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
        return mm(a.float(), b.float(), out=out)

    def added(total: torch.Tensor, *factors: torch.Tensor, out_dtype: torch.dtype, out: Any) -> torch.Tensor:
        seen.append(total.shape)
        if not adds:
            raise RuntimeError("self and mat2 must have the same dtype")
        assert total is out
        return addmm(total, *(x.float() for x in factors), out=out)

    monkeypatch.setattr(torch, "mm", in_fp32)
    monkeypatch.setattr(torch, "addmm", added)
    monkeypatch.setattr(masked_head, "_operands", lambda hidden, weight: (hidden, weight))
    monkeypatch.setattr(masked_head, "chunk_rows", lambda *_: 10)
    masked_head._adds_to_fp32.cache_clear()
    check(run(dtype=torch.bfloat16), rtol=1e-5, gradient_tolerance=0.1)
    masked_head._adds_to_fp32.cache_clear()
    assert seen == [(16, 16), *[(SIZE, WIDTH)] * 3] if adds else seen == [(16, 16)], "a try, then each chunk"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "triton"])
@pytest.mark.parametrize("chunk_rows", [7, 16, 100])
@pytest.mark.parametrize("row_multiple", [1, 16])
def test_options_change_nothing(
    monkeypatch: pytest.MonkeyPatch, fused: bool, chunk_rows: int, row_multiple: int
) -> None:
    """Rows are padded, and Triton's kernels make the passes, here interpreted: what comes out is the same."""
    if fused:
        kernels = pytest.importorskip("pipeline.model.head_kernels", exc_type=UserError, reason="no triton")
        monkeypatch.setattr(masked_head, "_has_kernels", lambda device: True)
        monkeypatch.setattr(kernels, "BLOCK", 16)  # the row has three blocks, the last one not whole
    monkeypatch.setattr(masked_head, "chunk_rows", lambda *_: chunk_rows)
    hidden, weight, targets, weights = inputs()
    head = MaskedHead(torch.nn.Parameter(weight.detach()), VOCABULARY)
    head.options = masked_head.HeadOptions(fused, row_multiple)
    output = head(hidden, targets, weights)
    (2 * output.loss).backward()
    with torch.no_grad():
        assert head(hidden, targets, weights).nll.equal(output.nll)
    plain = run(scores=())
    for name in ("loss", "nll", "confidence"):
        torch.testing.assert_close(getattr(output, name), getattr(plain.output, name), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(hidden.grad, plain.hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-6)
    assert not head.weight.grad[FORBIDDEN].any()
    if fused and chunk_rows == 7:
        assert head(hidden[:0], targets[:0], weights[:0]).loss.item() == 0, "a rank without masked positions"


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_kernels_write_gradients_in_bf16_and_pass_on_what_is_no_number() -> None:
    """As on a GPU: the logits are fp32, and the operands of the products that follow bf16."""
    kernels = pytest.importorskip("pipeline.model.head_kernels", exc_type=UserError, reason="no triton")
    hidden, weight, targets, weights = (x.detach() for x in inputs())
    logits = hidden @ weight.T
    nll, confidence = torch.empty(2, ROWS).unbind(0)
    sums = kernels.score(logits, targets, nll, confidence, VOCABULARY)
    found, exact = torch.empty_like(logits, dtype=torch.bfloat16), torch.empty_like(logits)
    for out in (found, exact):
        kernels.gradient(logits, targets, weights, *sums, out, VOCABULARY)
    torch.testing.assert_close(found.float(), exact, rtol=2**-6, atol=1e-6)
    arrays = [x.double().numpy() for x in (hidden, weight)]
    expected = oracles.full_logit_head(*arrays, targets.numpy(), weights.double().numpy(), FORBIDDEN)
    np.testing.assert_allclose(exact @ weight, expected.grad_hidden, rtol=1e-4, atol=1e-6)
    logits[4, 20] = torch.nan
    kernels.score(logits, targets, nll, confidence, VOCABULARY)
    assert nll.isnan().nonzero().flatten().tolist() == [4]


def test_chunks_of_a_gpu_take_the_planned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16 with products in fp32, the logits and gradients of all chunks share one chunk's room."""
    rows, vocabulary, width, memory = 400, 5000, 16, 32 * 6 * 5000 * 128

    def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        with _disable_current_modes():  # one kernel there
            result = a.float() @ b.float()
            return result if out is None else out.copy_(result)

    def add(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        with _disable_current_modes():  # one kernel there
            total += a.float() @ b.float()

    monkeypatch.setattr(masked_head, "_operands", lambda hidden, weight: (hidden, weight))
    monkeypatch.setattr(masked_head, "memory_of", lambda device: memory)
    monkeypatch.setattr(masked_head, "_product", product)
    monkeypatch.setattr(masked_head, "_add_product", add)
    hidden = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(vocabulary, width, dtype=torch.bfloat16))
    head = MaskedHead(weight, Vocabulary(vocabulary, vocabulary, 3))
    inputs = hidden, torch.randint(4, vocabulary, (rows,)), torch.rand(rows)
    assert chunk_rows(vocabulary, memory) == 128
    with LiveStorages([weight, *inputs]) as live:
        head(*inputs)
        assert live.peak == pytest.approx(head_memory(rows, width, vocabulary, 2, memory).peak, rel=0.02)


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

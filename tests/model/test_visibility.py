"""Attention masks against loops over pairs, shifted prediction, block diffusion in one forward."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PADDING, PROMPT, Examples
from pipeline.model.batch import MaskedBatch, Visibility, Vocabulary, masked_batch
from pipeline.model.sequence import WHOLE
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.model.visibility import attention_mask, block_mask, sees, takes_flex, visible_tiles
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.objectives.seam import mean_over_chains

MASK, SIZE, LENGTH, BLOCK = 3, 40, 13, 4
# (prompt, answer) lengths of the rows: with padding, without a prompt, with a last block of one token.
SHAPES = [(2, 9), (0, 13), (4, 5), (1, 10)]


def examples() -> Examples:
    """Return sequences with the lengths above."""
    roles = torch.full((len(SHAPES), LENGTH), PADDING, dtype=torch.int8)
    for row, (prompt, answer) in enumerate(SHAPES):
        roles[row, :prompt], roles[row, prompt : prompt + answer] = PROMPT, ANSWER
    tokens = torch.randint(4, SIZE, roles.shape, generator=torch.Generator().manual_seed(5))
    return Examples(tokens, roles, torch.arange(len(SHAPES)))


def network(prediction: str = "same", **changes: Any) -> MaskedDiffusionModel:
    """Return a model with logits far from uniform."""
    torch.manual_seed(1)
    config = ModelConfig(
        layers=2,
        hidden_size=32,
        heads=4,
        kv_heads=2,
        intermediate_size=48,
        init_std=0.3,
        prediction=prediction,  # type: ignore[arg-type]
        **changes,
    )
    return MaskedDiffusionModel(config, Vocabulary(SIZE, SIZE, MASK))


def block_of(row: int, position: int) -> int:
    """Return -1 in the prompt, the block in the answer, and 99 in the padding."""
    prompt, answer = SHAPES[row]
    if position < prompt:
        return -1
    return (position - prompt) // BLOCK if position < prompt + answer else 99


def block_batch(masked: torch.Tensor, first_given: bool = False) -> MaskedBatch:
    """Return the layout's batch with PUMA's loss weights."""
    layout, data = Blocks(MASK, True, first_given, size=BLOCK), examples()
    weights = mean_over_chains(layout.chains(data), masked)
    return layout.batch(data, masked, weights, int(masked.sum()), 1)


def test_block_causal_mask_equals_a_loop() -> None:
    """[xt ; x0]: xt sees its own block of xt and the earlier ones of x0; x0 sees x0 up to its own block."""
    batch = block_batch(torch.zeros(4, LENGTH, dtype=torch.bool))
    mask = attention_mask(batch.attention_mask, batch.visibility)
    assert isinstance(mask, torch.Tensor)
    for row in range(4):
        for query in range(2 * LENGTH):
            for key in range(2 * LENGTH):
                q, k = block_of(row, query % LENGTH), block_of(row, key % LENGTH)
                query_noisy, key_noisy = query < LENGTH, key < LENGTH
                clean = k < q if query_noisy else k <= q
                expected = k != 99 and (query_noisy and q == k if key_noisy else clean)
                assert bool(mask[row, 0, query, key]) == expected, (row, query, key)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_what_the_dense_mask_shows(padded: bool, copies: int, rows: int) -> None:
    """The block mask gives the same attention as the dense mask, by flex_attention's CPU reference."""
    data = examples()
    blocks = Blocks(MASK, True, size=BLOCK).decoding(data).blocks
    assert blocks is not None
    blocks = blocks[:rows]
    present = data.roles != PADDING if padded else None
    visibility = Visibility(blocks, data.tokens if copies == 2 else None)
    dense = attention_mask(present, visibility)
    noisy = torch.arange(copies * LENGTH) < (LENGTH if copies == 2 else 0)
    repeated = None if present is None else present.repeat(1, copies)
    flex = block_mask(blocks.repeat(1, copies), noisy, repeated)
    assert isinstance(dense, torch.Tensor)
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 4, 2, copies * LENGTH, 8, generator=random).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    assert dense.any(dim=-1).all(), "a position that sees nothing has no softmax"
    out = flex_attention(q, k, v, block_mask=flex)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def long_mask(length: int, copies: int, growing: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return blocks [3, N] of 48 tokens, noisy [N] and present [3, N], as a layout gives them."""
    random = torch.Generator().manual_seed(length)
    roles = torch.full((3, length), ANSWER, dtype=torch.int8)
    roles[0, : length // 3], roles[1, length // 2 :] = PROMPT, PADDING
    if not growing:  # answers and prompts in turns
        roles[torch.rand(3, length, generator=random) < 0.4] = PROMPT
    data = Examples(torch.zeros(3, length, dtype=torch.int64), roles, torch.arange(3))
    blocks = Blocks(MASK, True, size=48).decoding(data).blocks
    assert blocks is not None
    noisy = torch.arange(copies * length) < (length if copies == 2 else 0)
    return blocks.repeat(1, copies), noisy, (roles != PADDING).repeat(1, copies)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("length", "copies", "growing"), [
    (512, 2, True), (640, 1, True), (300, 2, True), (130, 1, True), (512, 2, False), (300, 1, False),
])  # fmt: skip
def test_tiles_hold_the_visible_pairs(length: int, copies: int, growing: bool, padded: bool) -> None:
    """Every pair that is seen lies in a tile that is computed, and a full tile holds no hidden pair.

    Where copies fill whole tiles and blocks grow with the position, the tiles are those of create_block_mask.
    """
    blocks, noisy, present = long_mask(length, copies, growing)
    dense = sees(blocks[:, :, None], blocks[:, None], noisy[:, None], noisy)
    if padded:
        dense &= present[:, None]
    some, every = visible_tiles(blocks, noisy, present if padded else None)
    spread = [x.repeat_interleave(128, 1).repeat_interleave(128, 2) for x in (some, every)]
    computed, full = (x[:, : copies * length, : copies * length] for x in spread)
    assert not (dense & ~computed).any()
    assert not (full & ~dense).any()
    if growing and length % 128 == 0:
        assert 0.1 < every.float().mean() < some.float().mean() < 0.9
        theirs = create_block_mask(lambda b, h, q, k: dense[b, q, k], 3, 1, *dense.shape[1:], device="cpu")
        ours = block_mask(blocks, noisy, present if padded else None)
        assert theirs.full_kv_num_blocks is not None
        assert ours.full_kv_num_blocks is not None
        assert ours.kv_num_blocks.equal(theirs.kv_num_blocks)
        assert ours.full_kv_num_blocks.equal(theirs.full_kv_num_blocks)
        assert ours.to_dense().equal(theirs.to_dense())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")
def test_compiled_flex_attention_takes_new_masks() -> None:
    """Its program is compiled once for the masks of all batches, and computes what the dense mask shows."""
    torch._dynamo.reset()
    counters.clear()
    q, k, v = torch.randn(3, 3, 2, 600, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    for growing in (True, False):
        blocks, noisy, present = long_mask(300, 2, growing)
        dense = sees(blocks[:, :, None], blocks[:, None], noisy[:, None], noisy) & present[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense[:, None])
        with torch.no_grad():
            out = WHOLE.attend(q, k, v, block_mask(blocks, noisy, present))
        rows = dense.any(dim=2)  # padding of xt sees its own block, which is hidden
        torch.testing.assert_close(
            out.transpose(1, 2)[rows], expected.transpose(1, 2)[rows], atol=1e-5, rtol=1e-5
        )
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


def test_small_heads_take_a_dense_mask() -> None:
    """Compiled flex_attention on a GPU refuses them."""
    assert [takes_flex(torch.device("cuda"), width) for width in (8, 15, 16, 128)] == [
        False,
        False,
        True,
        True,
    ]
    assert not takes_flex(torch.device("cpu"), 128)


@pytest.mark.parametrize("prediction", ["same", "shifted"])
def test_block_diffusion_in_one_forward_equals_one_forward_a_block(prediction: str) -> None:
    """Loss, NLL, scores and gradients equal those of one forward per block.

    The oracle runs one forward per block and sequence, on the clean blocks before it and the block of xt.
    """
    shifted = prediction == "shifted"
    data, model = examples(), network(prediction)
    masked = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.6
    masked &= Blocks(MASK, True, shifted, size=BLOCK).answer(data)
    masked[0, 6:10] = False  # a block whose chain has ended
    batch = block_batch(masked, shifted)._replace(scores=("margin", "entropy"))
    output = model(batch)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    losses, found = [], []
    for row, (prompt, answer) in enumerate(SHAPES):
        of_row = []
        # A given position 0 belongs to the prompt: blocks start at the first maskable position.
        first = max(prompt, 1) if shifted else prompt
        for start in range(first, prompt + answer, BLOCK):
            end = min(start + BLOCK, prompt + answer)
            targets = masked[row, start:end].nonzero().flatten() + start
            if not len(targets):
                continue
            ids = data.tokens[row : row + 1, :end].clone()
            ids[0, targets] = MASK
            blocks = torch.tensor([[max(-1, (i - first) // BLOCK) for i in range(end)]])
            hidden = model.model(ids, None, Visibility(blocks))[0]
            logits = hidden[targets - 1 if shifted else targets] @ model.model.embed_tokens.weight.T
            log_p = logits.index_fill(1, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
            nll = -log_p.gather(1, data.tokens[row, targets, None]).squeeze(1)
            of_row.append(nll.mean())
            p = log_p.exp()
            top = p.topk(2).values
            found.append(torch.stack([nll, top[:, 0], top[:, 0] - top[:, 1], torch.special.entr(p).sum(-1)]))
        losses.append(torch.stack(of_row).mean())
    expected = torch.stack(losses).mean()
    expected.backward()
    torch.testing.assert_close(output.loss, expected)
    ours = torch.stack([output.nll, output.confidence, output.margin, output.entropy])
    torch.testing.assert_close(ours, torch.cat(found, dim=1).detach(), atol=1e-5, rtol=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-4)


def test_shifted_prediction_reads_the_position_before() -> None:
    """NLL, confidence and decoding logits at position i come from the output at i - 1."""
    model, data = network("shifted"), examples()
    layout = Whole(MASK, True, first_given=True)
    masked = layout.answer(data)
    assert not masked[:, 0].any(), "position 0 has none before it: it is given"
    batch = layout.batch(data, masked, mean_over_chains(layout.chains(data), masked), int(masked.sum()), 1)
    output = model(batch)
    hidden = model.model(batch.input_ids, batch.attention_mask)
    logits = (hidden @ model.model.embed_tokens.weight.T)[:, :-1]  # outputs at 0..L-2
    log_p = logits.index_fill(2, torch.tensor([MASK]), -torch.inf).log_softmax(-1)
    nll = -log_p.gather(2, data.tokens[:, 1:, None]).squeeze(2)  # of positions 1..L-1
    torch.testing.assert_close(output.nll, nll[masked[:, 1:]].detach())
    confidence = log_p.exp().amax(-1)[masked[:, 1:]]
    torch.testing.assert_close(output.confidence, confidence.detach())
    sampled = model.logits(batch.input_ids, batch.rows, batch.attention_mask)
    torch.testing.assert_close(sampled.log_softmax(-1).exp().amax(-1), confidence.detach())


def test_autoregressive_input_is_causal_and_unmasked() -> None:
    """The loss is the mean next-token cross-entropy, and no position sees a later one."""
    model, data = network("shifted", tie_embeddings=False), examples()
    layout = LeftToRight(MASK, True, first_given=True)
    masked = layout.answer(data)
    batch = layout.batch(data, masked, mean_over_chains(layout.chains(data), masked), int(masked.sum()), 1)
    assert batch.input_ids.equal(data.tokens)
    losses = []
    for row, (prompt, answer) in enumerate(SHAPES):
        of_row = []
        for position in range(max(1, prompt), prompt + answer):  # only the prefix: nothing can leak
            hidden = model.model(
                data.tokens[row : row + 1, :position], None, Visibility(torch.arange(position)[None])
            )
            logits = model.lm_head.logits(hidden[0, -1:])
            of_row.append(torch.nn.functional.cross_entropy(logits, data.tokens[row, position, None]))
        losses.append(torch.stack(of_row).mean())
    torch.testing.assert_close(model(batch).loss, torch.stack(losses).mean())


def test_annealing_leads_from_causal_to_bidirectional() -> None:
    """At step s of S a later position is visible with probability (s - 1) / S, an earlier one always."""
    steps, length, before = 10, 60, 7
    data = Examples(
        torch.randint(4, SIZE, (1, length)), torch.full((1, length), ANSWER, dtype=torch.int8), torch.zeros(1)
    )
    layout = Whole(MASK, False, annealing_steps=steps, annealing_start=before + 1, seed=4)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    previous = None
    for step in range(1, steps + 1):
        mask = attention_mask(None, layout.annealed(data, before + step))
        assert isinstance(mask, torch.Tensor)
        assert mask[0, 0][~later].all()
        share = mask[0, 0][later].double().mean().item()
        assert share == pytest.approx((step - 1) / steps, abs=0.05)  # 4 standard deviations of 1770 draws
        assert previous is None or not mask.equal(previous)
        previous = mask
    assert attention_mask(None, layout.annealed(data, before + steps + 1)) is None
    assert attention_mask(None, Whole(MASK, False).annealed(data, 1)) is None


def test_half_annealed_attention_equals_a_masked_softmax() -> None:
    """The output at a position depends on visible positions only."""
    model = network()
    data = examples()
    visibility = Whole(MASK, True, annealing_steps=4, seed=1).annealed(data, 3)
    mask = attention_mask(None, visibility)
    assert isinstance(mask, torch.Tensor)
    first = model.model.layers[0].self_attn
    seen: list[torch.Tensor] = []
    handle = first.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for position in range(1, LENGTH):
        tokens = data.tokens.clone()
        tokens[:, position] = 4 + (tokens[:, position] - 3) % (SIZE - 4)
        seen.clear()
        model.model(data.tokens, None, visibility)
        model.model(tokens, None, visibility)
        changed = (seen[0] - seen[1]).abs().amax(dim=(0, 2)) > 0
        sees = mask[0, 0, :, position]
        assert changed[sees].all()
        assert not changed[~sees].any()
    handle.remove()


def test_mask_ids_of_an_ordinary_batch_are_seen_by_all() -> None:
    """With the default visibility the attention mask is None, or hides only padding."""
    batch = masked_batch(examples().tokens, torch.ones(4, LENGTH, dtype=torch.bool), 4 * LENGTH, MASK)
    assert attention_mask(batch.attention_mask, batch.visibility) is None
    padding = examples().roles == PADDING
    mask = attention_mask(~padding, Visibility())
    assert isinstance(mask, torch.Tensor)
    assert mask.shape == (4, 1, 1, LENGTH)

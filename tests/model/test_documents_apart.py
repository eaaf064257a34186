"""Documents that are kept apart: masks against loops over pairs, packed rows against each document alone."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pipeline.config import ModelConfig
from pipeline.data.examples import ANSWER, PADDING, Examples
from pipeline.model import visibility
from pipeline.model.batch import Visibility, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.model.visibility import attention_mask, block_mask, visible_tiles
from pipeline.objectives import noise
from pipeline.objectives.layouts import Blocks, LeftToRight, Whole
from pipeline.objectives.seam import mean_over_chains

MASK, SIZE, BLOCK = 3, 40, 4
LENGTHS = ([5, 1, 7, 1, 9], [11, 12], [23])  # of the documents of each row
LENGTH = 23
Kind = Literal["whole", "blocks", "causal"]


def rows(documents: bool = True, padding: int = 0) -> Examples:
    """Return three rows of packed documents; `padding` positions at the end of the first are cut off."""
    random = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, SIZE, (len(LENGTHS), LENGTH), generator=random)
    roles = torch.full_like(tokens, ANSWER, dtype=torch.int8)
    if padding:
        roles[0, -padding:] = PADDING
    each = np.stack([np.repeat(np.arange(len(part), dtype=np.int32), part) for part in LENGTHS])
    return Examples(tokens, roles, torch.arange(3), torch.from_numpy(each) if documents else None)


def layout_of(kind: Kind, shifted: bool, has_padding: bool = False) -> Whole:
    if kind == "blocks":
        return Blocks(MASK, has_padding, shifted, size=BLOCK)
    return (LeftToRight if kind == "causal" else Whole)(MASK, has_padding, shifted)


def places(row: int, shifted: bool) -> list[tuple[int, int]]:
    """Return (document, block in it) of each position; block -1 is the given first position."""
    found = []
    for document, length in enumerate(LENGTHS[row]):
        given = int(shifted)
        found += [(document, (i - given) // BLOCK if i >= given else -1) for i in range(length)]
    return found


@pytest.mark.parametrize("padding", [0, 6])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", ["whole", "blocks", "causal"])
def test_masks_equal_a_loop_over_pairs(kind: Kind, shifted: bool, padding: int) -> None:
    """The dense mask and flex_attention's rule, pair by pair; every visible pair lies in a computed tile."""
    data, layout = rows(padding=padding), layout_of(kind, shifted, has_padding=padding > 0)
    masked = torch.zeros(3, LENGTH, dtype=torch.bool)
    batch = layout.batch(data, masked, masked.float(), 0, 1)
    copies = 2 if kind == "blocks" else 1
    dense = attention_mask(batch.attention_mask, batch.visibility)
    assert isinstance(dense, Tensor)
    blocks = batch.visibility.blocks
    blocks = torch.zeros(1, LENGTH, dtype=torch.int64) if blocks is None else blocks
    noisy = torch.arange(copies * LENGTH) < (LENGTH if copies == 2 else 0)
    present = None if batch.attention_mask is None else batch.attention_mask.repeat(1, copies)
    assert data.documents is not None
    documents = data.documents.repeat(1, copies)
    given = None if batch.visibility.blocks is None else blocks.repeat(1, copies)
    flex = block_mask(given, noisy, present, documents)
    some, every = visible_tiles(blocks.repeat(1, copies), noisy, present, documents)
    assert some.all(), "one tile, which every document lies in"
    assert not every.any()
    for row in range(3):
        place = places(row, shifted)
        for query in range(copies * LENGTH):
            for key in range(copies * LENGTH):
                (q_document, q), (k_document, k) = place[query % LENGTH], place[key % LENGTH]
                seen = kind != "causal" or key <= query
                if kind == "blocks":
                    q_noisy, k_noisy = query < LENGTH, key < LENGTH
                    clean = k < q if q_noisy else k <= q
                    seen = (q_noisy and q == k) if k_noisy else clean
                hidden = row == 0 and key % LENGTH >= LENGTH - padding
                padded = row == 0 and query % LENGTH >= LENGTH - padding
                if kind == "blocks" and padded:
                    continue  # what padding sees is of no account
                expected = seen and q_document == k_document and not hidden
                assert bool(dense[row, 0, query, key]) == expected, (row, query, key)
                rule = flex.mask_mod(*(torch.tensor(i) for i in (row, 0, query, key)))
                assert bool(rule) == expected, (row, query, key)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_tiles_are_those_of_create_block_mask(copies: int, padded: bool) -> None:
    """Long rows of several tiles: the tiles are exact, and flex_attention agrees with the dense mask.

    With padding or two copies a few more tiles are computed: documents overlap there, but not where they
    are present, or of a visible block.
    """
    length, random = 640, np.random.default_rng(0)
    cuts = [np.sort(random.choice(length, size=count, replace=False)) for count in (2, 9, 0)]
    cuts[1][3:6] = 128, 256, 384  # documents that fill a tile
    documents = np.stack([(np.arange(length)[:, None] >= cut).sum(axis=1) for cut in map(np.sort, cuts)])
    present = torch.ones(3, length, dtype=torch.bool)
    present[0, 400:] = False
    roles = torch.where(present, ANSWER, PADDING).to(torch.int8)
    tokens = torch.zeros(3, length, dtype=torch.int64)
    data = Examples(tokens, roles, torch.arange(3), torch.from_numpy(documents.astype(np.int32)))
    blocks, apart = (Blocks(MASK, True, size=48) if copies == 2 else Whole(MASK, True)).decoding(data)[::3]
    blocks = tokens[:1] if blocks is None else blocks
    blocks, noisy = blocks.repeat(1, copies), torch.arange(copies * length) < length * (copies - 1)
    apart, shown = apart.repeat(1, copies), present.repeat(1, copies) if padded else None
    dense = attention_mask(
        present if padded else None,
        Visibility(blocks[:, :length], tokens if copies == 2 else None, documents=data.documents),
    )
    assert isinstance(dense, Tensor)
    some, every = visible_tiles(blocks, noisy, shown, apart)
    theirs = create_block_mask(lambda b, h, q, k: dense[b, 0, q, k], 3, 1, *dense.shape[2:], device="cpu")
    ours = block_mask(blocks, noisy, shown, apart)
    assert theirs.full_kv_num_blocks is not None
    assert ours.full_kv_num_blocks is not None
    assert 0.02 < every.float().mean() < some.float().mean() < 0.8
    assert ours.full_kv_num_blocks.equal(theirs.full_kv_num_blocks)
    surplus = ours.to_dense() - theirs.to_dense()
    assert (surplus >= 0).all()
    assert surplus.sum() <= (3 if padded or copies == 2 else 0)
    q, k, v = torch.randn(3, 3, 1, copies * length, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    out = flex_attention(q, k, v, block_mask=ours)
    assert isinstance(out, Tensor)
    seeing = dense[:, 0].any(dim=2)
    torch.testing.assert_close(
        out.transpose(1, 2)[seeing], expected.transpose(1, 2)[seeing], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(("kind", "shifted"), [
    ("whole", False), ("whole", True), ("blocks", False), ("blocks", True), ("causal", True),
])  # fmt: skip
def test_a_packed_row_equals_each_document_alone(kind: Kind, shifted: bool) -> None:
    """NLL, confidence and gradients in fp32; the oracle runs one forward per document."""
    torch.manual_seed(1)
    config = ModelConfig(
        layers=2, hidden_size=32, heads=4, kv_heads=2, intermediate_size=48, init_std=0.3,
        prediction="shifted" if shifted else "same",
    )  # fmt: skip
    model = MaskedDiffusionModel(config, Vocabulary(SIZE, SIZE, MASK))
    data, layout = rows(), layout_of(kind, shifted)
    masked = layout.answer(data)
    if kind != "causal":
        masked = masked & (torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.6)
    # Chains of the packed rows are those of the documents, in order: weights of each chain are its own.
    weights = torch.rand(3, LENGTH, generator=torch.Generator().manual_seed(3))
    packed = model(layout.batch(data, masked, weights, int(masked.sum()), 1))
    packed.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    nll, confidence, total = [], [], torch.zeros(())
    for row, lengths in enumerate(LENGTHS):
        for start, length in zip(np.cumsum([0, *lengths]), lengths, strict=False):
            part = slice(int(start), int(start) + length)
            one = Examples(data.tokens[row : row + 1, part], data.roles[row : row + 1, part], torch.zeros(1))
            shown, count = masked[row : row + 1, part], int(masked[row, part].sum())
            if count == 0:
                continue
            alone = model(layout.batch(one, shown, weights[row : row + 1, part], count, 1))
            total = total + alone.loss
            nll.append(alone.nll)
            confidence.append(alone.confidence)
    total.backward()
    torch.testing.assert_close(packed.loss, total)
    torch.testing.assert_close(packed.nll, torch.cat(nll), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.confidence, torch.cat(confidence), atol=1e-5, rtol=1e-5)
    assert len(gradients) == len(list(model.named_parameters()))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-4)

    # Not kept apart, the same rows give another loss: the test would see a leak.
    together = model(layout.batch(rows(documents=False), masked, weights, int(masked.sum()), 1))
    assert (together.nll[: int(masked[0].sum())] - packed.nll[: int(masked[0].sum())]).abs().max() > 1e-2


def test_padding_takes_flex_attention_where_a_gpu_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its block mask shows what the dense mask does; decoding keeps the dense one, as a CPU does."""
    present = torch.arange(384) < torch.tensor([[384], [140], [17]])
    dense = attention_mask(present, Visibility())
    assert isinstance(dense, Tensor)
    monkeypatch.setattr(visibility, "takes_flex", lambda *_: True)
    flex = attention_mask(present, Visibility())
    assert isinstance(flex, BlockMask)
    for row, query, key in ((0, 383, 1), (1, 0, 139), (1, 0, 140), (2, 383, 16), (2, 3, 17)):
        rule = flex.mask_mod(*(torch.tensor(i) for i in (row, 0, query, key)))
        assert bool(rule) == bool(dense[row, 0, 0, key])
    assert flex.full_kv_num_blocks is not None
    assert flex.full_kv_num_blocks[:, 0].tolist() == [[3] * 3, [1] * 3, [0] * 3]
    assert flex.kv_num_blocks[:, 0].tolist() == [[0] * 3, [1] * 3, [1] * 3]
    assert isinstance(attention_mask(present[:, :300], Visibility()), Tensor), "no whole number of tiles"
    with torch.no_grad():
        assert isinstance(attention_mask(present, Visibility()), Tensor)


@pytest.mark.parametrize("shifted", [False, True])
def test_blocks_begin_anew_in_each_document(shifted: bool) -> None:
    """Chains, and the weights of the loss, by loops over documents."""
    data, layout = rows(), layout_of("blocks", shifted)
    chains = layout.chains(data)
    weights = mean_over_chains(chains, chains.answer)
    for row in range(3):
        place = places(row, shifted)
        names = list(dict.fromkeys(each for each in place if each[1] >= 0))
        for position, each in enumerate(place):
            given = each[1] < 0
            assert int(chains.index[row, position]) == (chains.count if given else names.index(each))
            expected = 0.0 if given else 1 / place.count(each) / len(names) / 3
            assert float(weights[row, position]) == pytest.approx(expected)


def test_annealed_attention_stays_inside_a_document() -> None:
    """Earlier positions always, later ones as drawn, both of the same document alone."""
    data = rows()
    layout = Whole(MASK, False, annealing_steps=10, seed=4)
    mask = attention_mask(None, layout.annealed(data, 5)._replace(documents=data.documents))
    assert isinstance(mask, Tensor)
    positions = torch.arange(LENGTH)[None]
    drawn = noise.uniform(4, noise.ANNEALED_ATTENTION, torch.full_like(positions, 5), positions.T, positions)
    for row in range(3):
        documents = [document for document, _ in places(row, False)]
        for query in range(LENGTH):
            for key in range(LENGTH):
                seen = key <= query or float(drawn[query, key]) < 0.4
                assert bool(mask[row, 0, query, key]) == (seen and documents[query] == documents[key])

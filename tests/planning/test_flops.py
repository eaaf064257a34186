"""The count of a step's FLOPs against torch's own counter, and of visible pairs against the mask itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import objectives
from pipeline.base.errors import UserError
from pipeline.config import Config, DataConfig, EngineConfig, ModelConfig, ObjectiveConfig, TrainConfig
from pipeline.data.examples import ANSWER, PROMPT, Examples
from pipeline.data.indexed import write_dataset
from pipeline.model.batch import MaskedBatch, Vocabulary
from pipeline.model.transformer import MaskedDiffusionModel
from pipeline.model.visibility import attention_mask
from pipeline.objectives.seam import model_input
from pipeline.planning.documents import document_pairs, pairs_within
from pipeline.planning.flops import Flops, muon_flops, step_flops, visible_pairs
from pipeline.planning.gpus import GPUS, find_gpu, gpu_of_device

SEQUENCES, LENGTH, ROWS, MASK = 3, 24, 104, 4
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
PLAIN = ModelConfig(layers=2, hidden_size=32, heads=4, intermediate_size=56)
GROUPED = dataclasses.replace(PLAIN, kv_heads=2, head_size=12, tie_embeddings=False, qk_norm=True)
CAUSAL = ObjectiveConfig("autoregressive")
BLOCKS = ObjectiveConfig("puma", block_size=7)


def config_of(
    model: ModelConfig = PLAIN,
    objective: ObjectiveConfig = ObjectiveConfig(),  # noqa: B008
    recompute: Literal["none", "swiglu", "blocks"] = "none",
) -> Config:
    prediction: Literal["same", "shifted"] = "shifted" if objective.kind == "autoregressive" else "same"
    return Config(
        "unused",
        data=DataConfig(prefixes=["unused"], sequence_length=LENGTH),
        model=dataclasses.replace(model, prediction=prediction),
        objective=objective,
        train=TrainConfig(global_batch_size=SEQUENCES, micro_batch_size=SEQUENCES),
        engine=EngineConfig(kind="plain", activation_checkpointing=recompute),
    )


def batch_of(config: Config, prompt: int = 0, step: int = 1) -> MaskedBatch:
    """Return what the objective of `config` shows the model, with a prompt of so many tokens."""
    torch.manual_seed(0)
    roles = torch.full((SEQUENCES, LENGTH), ANSWER, dtype=torch.int8)
    roles[:, :prompt] = PROMPT
    examples = Examples(torch.randint(5, ROWS, (SEQUENCES, LENGTH)), roles, torch.arange(SEQUENCES))
    objective = objectives.build(config, MASK, False).at(step)
    chains = objective.layout.chains(examples)
    state = objective.begin(chains, torch.zeros(SEQUENCES, 1, dtype=torch.int64), step)
    return model_input(objective, chains, state, int(state.masked.sum()), step)


def counted(config: Config, batch: MaskedBatch) -> int:
    """Return what torch's counter sees in forward and backward, attention as the products that it is."""
    recompute = config.engine.activation_checkpointing
    model = MaskedDiffusionModel(config.model, Vocabulary(ROWS, ROWS, MASK), recompute)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter,
    ):
        model(batch).loss.backward()
    return counter.get_total_flops()


def flops_of(config: Config, batch: MaskedBatch, prompt: int = 0) -> Flops:
    return step_flops(config, ROWS, len(batch.rows), prompt_length=prompt)


@pytest.mark.parametrize("recompute", ["none", "swiglu", "blocks"])
@pytest.mark.parametrize("model", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_flops_are_those_that_torch_counts(
    model: ModelConfig, recompute: Literal["none", "swiglu", "blocks"]
) -> None:
    config = config_of(model, recompute=recompute)
    batch = batch_of(config)
    assert counted(config, batch) == flops_of(config, batch).executed


@pytest.mark.parametrize("objective", [CAUSAL, BLOCKS], ids=["causal", "blocks"])
def test_a_mask_computes_the_pairs_that_do_not_see_each_other_too(objective: ObjectiveConfig) -> None:
    """The whole difference to torch's count: it has all pairs of the (doubled) sequence."""
    config = config_of(objective=objective)
    batch = batch_of(config, prompt=5)
    flops = flops_of(config, batch, prompt=5)
    seen = visible_pairs(objective, 1, LENGTH, 5)
    inputs = LENGTH * (2 if objective is BLOCKS else 1)
    assert counted(config, batch) == flops.model + flops.attention * (inputs**2 - seen) / seen
    assert seen < inputs**2


@pytest.mark.parametrize("prompt", [0, 5, 7])
@pytest.mark.parametrize("objective", [ObjectiveConfig(), CAUSAL, BLOCKS], ids=["full", "causal", "blocks"])
def test_visible_pairs_are_those_of_the_mask(objective: ObjectiveConfig, prompt: int) -> None:
    batch = batch_of(config_of(objective=objective), prompt)
    mask = attention_mask(batch.attention_mask, batch.visibility)
    pairs = LENGTH**2 if mask is None else int(mask[0].sum())
    assert visible_pairs(objective, 1, LENGTH, prompt) == pairs


def test_annealed_attention_is_counted_by_its_expectation() -> None:
    objective = ObjectiveConfig(attention_annealing_steps=40)
    for step in (1, 20, 41):
        batch = batch_of(config_of(objective=objective), step=step)
        mask = attention_mask(None, batch.visibility)
        pairs = LENGTH**2 if mask is None else int(mask[0].sum())
        assert visible_pairs(objective, step, LENGTH) == pytest.approx(pairs, abs=40)  # 4.8 deviations
    late = ObjectiveConfig("autoregressive", "puma", 100, attention_annealing_steps=40)
    assert [visible_pairs(late, step, LENGTH) for step in (99, 100, 120, 140)] == [300, 300, 438, 576]


def test_a_switch_changes_the_count() -> None:
    objective = ObjectiveConfig("autoregressive", "puma", 10, block_size=7)
    before, after = (step_flops(config_of(objective=objective), ROWS, 10, step) for step in (9, 10))
    assert after.swiglu == 2 * before.swiglu
    assert after.head == before.head


def test_gpus_are_found_by_their_names() -> None:
    assert gpu_of_device("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert gpu_of_device("NVIDIA H100 PCIe") is GPUS["h100-pcie"]
    assert gpu_of_device("NVIDIA A100-SXM4-40GB") is GPUS["a100-40"]
    assert gpu_of_device("Tesla V100-SXM2-16GB") is None
    with pytest.raises(UserError, match=r"--gpu h10 is not known. Did you mean 'h100'\?"):
        find_gpu("h10")


def test_pairs_within_documents_are_those_of_all_offsets() -> None:
    """Every document at every offset in the rows, pair by pair."""
    limit = 12
    lengths = np.array([0, 1, 2, 5, 12, 13, 40])
    for length, found in zip(lengths, pairs_within(lengths.astype(float), limit), strict=True):
        counts = [
            sum((i + offset) // limit == (j + offset) // limit for i in range(length) for j in range(length))
            for offset in range(limit)
        ]
        assert found == pytest.approx(np.mean(counts))


@pytest.mark.parametrize("objective", [ObjectiveConfig(), CAUSAL, ObjectiveConfig("puma", block_size=4)])
def test_visible_pairs_of_documents_are_those_of_the_mask(objective: ObjectiveConfig) -> None:
    """Documents of whole blocks, for which the count of block diffusion is exact."""
    config = config_of(objective=objective)
    documents = torch.tensor([0] * 4 + [1] * 12 + [2] * 8, dtype=torch.int32).repeat(SEQUENCES, 1)
    roles = torch.full((SEQUENCES, LENGTH), ANSWER, dtype=torch.int8)
    examples = Examples(torch.randint(5, ROWS, roles.shape), roles, torch.arange(SEQUENCES), documents)
    layout = objectives.build(config, MASK, False).at(1).layout
    batch = layout.batch(examples, roles > ANSWER, roles.float(), 0, 1)
    mask = attention_mask(batch.attention_mask, batch.visibility)
    assert mask is not None
    assert visible_pairs(objective, 1, LENGTH, within=4**2 + 12**2 + 8**2) == int(mask[0].sum())


def test_pairs_come_from_the_indices_of_the_blend(tmp_path: Path) -> None:
    """Datasets of documents of one length each, by weights, tokens and temperature."""
    prefixes = []
    for name, length, count in (("short", 3, 40), ("long", 8, 5)):
        prefixes.append(str(tmp_path / name))
        tokens, lengths = np.full(length * count, 5, np.uint16), np.full(count, length, np.int32)
        write_dataset([(tokens, lengths)], tmp_path / name, np.dtype(np.uint16), pairs=False)
    data = DataConfig(prefixes=prefixes, sequence_length=12, isolate_documents=True)
    short, long = 12 * pairs_within(np.array([3.0, 8.0]), 12) / [3, 8]  # of an example of such documents
    assert document_pairs(data) == pytest.approx((3 * short + long) / 4)  # 120 and 40 tokens
    weighted = dataclasses.replace(data, weights=[1.0, 3.0])
    assert document_pairs(weighted) == pytest.approx((short + 3 * long) / 4)
    hot = dataclasses.replace(data, temperature=2.0)
    assert document_pairs(hot) == pytest.approx((3**0.5 * short + long) / (3**0.5 + 1))
    assert document_pairs(dataclasses.replace(data, isolate_documents=False)) is None
    assert document_pairs(dataclasses.replace(data, prefixes=[str(tmp_path / "none")])) is None


@pytest.mark.parametrize("shape", [(32, 32), (56, 32), (12, 40)])
def test_an_update_by_muon(shape: tuple[int, int]) -> None:
    """The products of torch's own Muon, as its counter sees them."""
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    optimizer = torch.optim.Muon([weight])
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    assert counter.get_total_flops() == muon_flops([shape])

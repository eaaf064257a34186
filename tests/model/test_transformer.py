"""The network against transformers' Qwen2, Qwen3 and Llama with a bidirectional attention mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from pipeline.config import ModelConfig
from pipeline.model.attention import rotary_table, rotate
from pipeline.model.batch import Vocabulary, masked_batch
from pipeline.model.transformer import MaskedDiffusionModel

VOCABULARY = Vocabulary(48, 48, 3)
SHAPE: dict[str, Any] = {
    "layers": 3,
    "hidden_size": 32,
    "heads": 4,
    "intermediate_size": 56,
    "rope_theta": 5000.0,
}


def tokens(batch: int = 3, length: int = 11) -> torch.Tensor:
    """Return random tokens [B, L]."""
    return torch.randint(4, 48, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Qwen2", {"attention_bias": True}),
        ("Qwen3", {"qk_norm": True, "head_size": 12}),
        ("Llama", {}),
        ("Llama", {"rope_factor": 8.0, "rope_original_length": 64}),
    ],
    ids=["Qwen2", "Qwen3", "Llama", "Llama-3.1"],
)
def test_equals_transformers(family: str, settings: dict[str, Any], tied: bool, kv_heads: int) -> None:
    """With weights copied by name, hidden states and logits are equal."""
    config = ModelConfig(kv_heads=kv_heads, tie_embeddings=tied, **SHAPE | settings)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0}
    if config.rope_factor > 1:
        rope |= {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config_class = getattr(transformers, f"{family}Config")
    theirs_config = config_class(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        tie_word_embeddings=tied,
        head_dim=config.head_width,
        rope_parameters=rope,
        attn_implementation="eager",
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForCausalLM")(theirs_config).eval()
    ours = MaskedDiffusionModel(config, VOCABULARY).eval()
    for parameter in theirs.parameters():  # move norms and biases away from 1 and 0
        torch.nn.init.normal_(parameter, 0.3 if parameter.ndim == 1 else 0.0, 0.2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    ids = tokens()
    everything = torch.zeros(3, 1, 11, 11)  # a 4D mask of zeros: every position sees every other
    with torch.no_grad():
        expected = theirs(ids, attention_mask=everything, output_hidden_states=True)
        hidden = ours.model(ids)
        logits = ours.logits(ids, torch.arange(33))
    torch.testing.assert_close(hidden, expected.hidden_states[-1], atol=1e-5, rtol=1e-5)
    assert (logits[:, 3] == -torch.inf).all()
    allowed = torch.arange(48) != 3
    theirs_logits = expected.logits.flatten(0, 1)[:, allowed]
    torch.testing.assert_close(logits[:, allowed], theirs_logits, atol=1e-5, rtol=1e-5)
    assert theirs_logits.std() > 0.3, "logits near 0 would compare nothing"


def test_rotary_scores_depend_on_the_distance_only() -> None:
    """The rotation equals that of complex numbers in the half-split layout."""
    length, size, theta = 9, 8, 100.0
    q, k = torch.randn(2, 1, 1, 1, size, generator=torch.Generator().manual_seed(0)).unbind(0)
    table = rotary_table(length, size, theta, 1.0, length, q.device)
    turned_q, turned_k = (
        rotate(q.expand(1, 1, length, size), table),
        rotate(k.expand(1, 1, length, size), table),
    )
    scores = (turned_q @ turned_k.transpose(-1, -2))[0, 0]
    for distance in range(-length + 1, length):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    half = size // 2
    as_complex = q[0, 0, 0, :half].numpy() + 1j * q[0, 0, 0, half:].numpy()
    for position in range(length):
        angles = position * theta ** (-np.arange(half) * 2 / size)
        expected = as_complex * np.exp(1j * angles)
        np.testing.assert_allclose(turned_q[0, 0, position, :half], expected.real, atol=1e-5)
        np.testing.assert_allclose(turned_q[0, 0, position, half:], expected.imag, atol=1e-5)


def test_attention_is_bidirectional_and_blind_to_padding() -> None:
    model = MaskedDiffusionModel(ModelConfig(**SHAPE), VOCABULARY).eval()
    ids = tokens()
    changed = ids.clone()
    changed[:, -1] = 4 + (changed[:, -1] - 3) % 44
    assert not torch.allclose(model.model(ids)[:, 0], model.model(changed)[:, 0]), "the first sees the last"
    present = torch.ones(3, 11, dtype=torch.bool)
    present[:, -1] = False
    with torch.no_grad():
        one, two = model.model(ids, present)[:, :-1], model.model(changed, present)[:, :-1]
        alone = model.model(ids[:, :-1])
    torch.testing.assert_close(one, two, rtol=0, atol=0)
    torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_an_untrained_model_is_uncertain(tied: bool) -> None:
    """Confidence is near 1/V everywhere; with tied N(0, 1) embeddings it would be near 1."""
    torch.manual_seed(0)
    model = MaskedDiffusionModel(ModelConfig(tie_embeddings=tied), Vocabulary(1000, 1000, 3))
    ids = torch.randint(4, 1000, (4, 32))
    masked = torch.rand(4, 32) < 0.5
    output = model(masked_batch(ids, masked, int(masked.sum()), 3))
    assert output.confidence.max() < 5 / 1000
    assert output.loss.item() == pytest.approx(np.log(999), abs=0.1)


def test_loss_is_the_mean_over_sequences_of_their_mean_nll() -> None:
    """Sequences with different numbers of masks, against cross-entropy on full logits."""
    torch.manual_seed(0)
    model = MaskedDiffusionModel(ModelConfig(**SHAPE), VOCABULARY)
    ids = tokens()
    masked = torch.zeros(3, 11, dtype=torch.bool)
    masked[0, 4] = masked[1, 2:9] = masked[2, ::3] = True
    batch = masked_batch(ids, masked, int(masked.sum()), 3)
    assert (batch.input_ids == torch.where(masked, 3, ids)).all()
    output = model(batch)
    logits = model.model(batch.input_ids) @ model.model.embed_tokens.weight.T
    logits = logits.index_fill(2, torch.tensor([3]), -torch.inf)
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    expected = torch.stack([each[row][masked[row]].mean() for row in range(3)]).mean()
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(output.nll, each[masked].detach())
    torch.testing.assert_close(output.confidence, logits.softmax(-1).amax(-1)[masked].detach())


@pytest.mark.parametrize(("recompute", "share"), [("swiglu", 0.85), ("blocks", 0.2)])
def test_what_is_recomputed_is_not_kept(recompute: Any, share: float) -> None:
    """Recomputation keeps a fraction of the activations, with the same loss and gradients bit for bit."""
    ids, masked = tokens(), torch.zeros(3, 11, dtype=torch.bool)
    masked[:, ::2] = True
    batch = masked_batch(ids, masked, int(masked.sum()), 3)
    results, kept = [], []
    changes = {"layers": 6, "intermediate_size": 96}
    for setting in ("none", recompute):
        torch.manual_seed(0)
        model = MaskedDiffusionModel(ModelConfig(**SHAPE | changes), VOCABULARY, setting)
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(batch)
        for parameter in model.parameters():
            saved.pop(parameter.untyped_storage().data_ptr(), None)
        output.loss.backward()
        results.append([output.loss, *(parameter.grad for parameter in model.parameters())])
        kept.append(sum(saved.values()))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    assert kept[1] < share * kept[0]

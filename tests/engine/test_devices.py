"""What an engine does differently on a GPU, seen without one."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from pipeline import config as configuration
from pipeline.base.errors import UserError
from pipeline.config import Config, WatchdogConfig
from pipeline.engine import build
from pipeline.engine.build import build_engine
from pipeline.engine.deepspeed.settings import complete_settings
from pipeline.engine.snapshot import HostCopy, pinned
from pipeline.model.batch import Vocabulary
from pipeline.model.layers import Linear, draw_normal
from pipeline.ranks import Ranks, join_ranks

SHAPE = "--model.layers 1 --model.hidden_size 16 --model.heads 2 --model.intermediate_size 32".split()


def load(*more: str) -> Config:
    return configuration.load(["--run_dir", "x", "--data.prefixes", "[x]", *SHAPE, *more])


@pytest.fixture
def deterministic_again() -> Iterator[None]:
    """Give the process back its choice of kernels."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.mark.usefixtures("deterministic_again")
@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_chosen_before_the_model_is_made(wanted: bool) -> None:
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    config = load("--engine.kind", "plain", "--engine.deterministic", str(wanted).lower())
    build_engine(config, Ranks(), Vocabulary(16, 16, 3))
    assert torch.are_deterministic_algorithms_enabled() == wanted
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_initial_weights_are_those_of_the_seed_in_every_precision(dtype: torch.dtype) -> None:
    """They are drawn by the CPU in fp32 and rounded, wherever the weight lies."""
    weight = torch.empty(40, 24, dtype=dtype)
    torch.manual_seed(7)
    draw_normal(weight, 0.02)
    torch.manual_seed(7)
    expected = torch.empty(40, 24).normal_(0.0, 0.02)
    assert torch.equal(weight, expected.to(dtype))


def test_a_model_without_memory_draws_nothing() -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        layer: nn.Linear = Linear(8, 8, 0.02)
    assert layer.weight.is_meta
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("visible", "gpus", "local_rank", "index"),
    [(None, 8, 7, 7), ("0,1", 2, 1, 1), ("3", 1, 5, 0), (None, 1, 0, 0)],
)
def test_each_process_has_a_gpu_of_its_own(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, local_rank: int, index: int
) -> None:
    chosen: list[torch.device] = []
    see(monkeypatch, visible, gpus, local_rank, chosen)
    assert join_ranks("auto").device == torch.device("cuda", index)
    assert chosen == [torch.device("cuda", index)]
    assert join_ranks("cpu").device.type == "cpu"


@pytest.mark.parametrize(("visible", "gpus", "local_rank"), [(None, 8, 8), ("0,1", 2, 2), (None, 1, 1)])
def test_a_process_without_a_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int, local_rank: int
) -> None:
    see(monkeypatch, visible, gpus, local_rank, [])
    with pytest.raises(UserError, match=rf"process {local_rank + 1} of .* torch sees {gpus}.*nproc_per_node"):
        join_ranks("auto")


def see(
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    gpus: int,
    local_rank: int,
    chosen: list[torch.device],
) -> None:
    """Let this process be one of a node of GPUs."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for name, value in (("RANK", local_rank), ("WORLD_SIZE", 16), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)


@pytest.mark.parametrize(
    ("device", "gpu", "accelerator"),
    [("auto", True, "cuda"), ("cuda", True, "cuda"), ("cpu", True, "cpu"), ("auto", False, "cpu")],
)
def test_deepspeed_takes_the_device_of_the_run(
    monkeypatch: pytest.MonkeyPatch, device: str, gpu: bool, accelerator: str
) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    build._deepspeed(device)
    assert os.environ["DS_ACCELERATOR"] == accelerator


def test_gradients_are_summed_in_fp32_unless_the_json_says_otherwise() -> None:
    zero = {"zero_optimization": {"stage": 3}}
    config = load("--engine.precision", "bf16")
    settings = complete_settings(zero, config, Ranks())
    assert settings["communication_data_type"] == "fp32"
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}
    chosen = {"communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    settings = complete_settings(zero | chosen, config, Ranks())
    assert {key: settings[key] for key in chosen} == chosen


def test_the_watchdog_speaks_before_a_collective_fails() -> None:
    for first in (60.0, 1800.0, 86400.0):
        assert WatchdogConfig(first=first).collective_limit.total_seconds() > first
    assert WatchdogConfig(first=60.0).collective_limit.total_seconds() == 600


class Cuda:
    """CUDA's functions for pinned memory; remembers what is pinned."""

    def __init__(self, status: int = 0) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.registered[address] = size
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_pinned_buffers_take_no_more_than_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own are rounded up to a power of two: 5 GiB would take 8."""
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    buffer = pinned(torch.empty(5 * 1024, dtype=torch.uint8))
    assert cuda.registered == {buffer.data_ptr(): 5 * 1024}
    del buffer
    assert cuda.registered == {}
    assert pinned(torch.empty(0)).numel() == 0
    assert cuda.registered == {}


def test_memory_that_cannot_be_pinned_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(status=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    address = pinned(torch.empty(8)).data_ptr()
    assert address in cuda.registered, "and nothing unregisters what was never registered"
    state = HostCopy()("weights", torch.arange(3.0))
    assert state.tolist() == [0.0, 1.0, 2.0]

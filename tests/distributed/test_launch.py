"""What tells a process its place: torchrun on several nodes, SLURM's variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.base.errors import Failure
from pipeline.ranks import join_ranks, naming_lost_ranks
from support.forked import RANKS, run_forked
from support.programs import ROOT, environment_of_ranks, free_ports

STEPS = str(ROOT / "tests/support/steps.py")
SETTINGS = """
    --model.layers 1 --model.hidden_size 16 --model.heads 2 --model.intermediate_size 32 --train.steps 3
    --schedule.warmup_steps 1 --train.global_batch_size 4 --train.micro_batch_size 2 --objective.stages 4
    --optimizer.ema_decay 0.9
""".split()


@pytest.mark.distributed
def test_two_agents_equal_one_machine(tmp_path: Path) -> None:
    """Two torchrun agents of one process each, as on two nodes, train as two processes of one node do."""
    one, two = str(tmp_path / "one.pt"), str(tmp_path / "two.pt")
    result = run_forked(STEPS, one, "3", "-", *SETTINGS, ranks=2)
    assert result.returncode == 0, result.stderr
    command = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    place = ["--master_addr=127.0.0.1", f"--master_port={free_ports(1)[0]}"]
    agents = [
        RANKS.start(
            [*command, *place, f"--node_rank={node}", STEPS, two, "3", "-", *SETTINGS],
            environment_of_ranks(),
            [tmp_path / f"output_{node}", tmp_path / f"error_{node}"],
        )
        for node in (0, 1)
    ]
    for node, agent in enumerate(agents):
        agent.join(300)
        assert agent.exitcode == 0, (tmp_path / f"error_{node}").read_text()
    single, joint = torch.load(one, weights_only=True), torch.load(two, weights_only=True)
    assert len(single["losses"]) == 3
    assert joint["losses"] == single["losses"]


def test_slurms_variables_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of a step of several knows its rank, also where the batch shell would say 0."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    slurm = {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "JOB_ID": "123", "STEP_NODELIST": "n[1-2]"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MASTER_ADDR", "n1")
    ranks = join_ranks("cpu")
    assert (ranks.rank, ranks.world_size, ranks.local_rank) == (3, 4, 1)


def test_a_lost_rank_is_one_line() -> None:
    """The words are gloo's, from a training of two ranks of which one was killed."""
    said = (
        "[/__w/pytorch/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error "
        "[127.0.0.1]:21895: Connection reset by peer. This is typically caused by a remote worker hanging"
    )
    with (
        pytest.raises(Failure, match=r"another rank has ended \(Connection reset by peer\)"),
        naming_lost_ranks(),
    ):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="shapes"), naming_lost_ranks():
        raise RuntimeError("shapes differ")

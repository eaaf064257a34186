"""A real SLURM of two nodes on this machine: one controller, two node daemons, all in a temporary folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from support.programs import free_ports

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONFIGURATION = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller}
AuthType=auth/munge
AuthInfo=cred_expire=5
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=5
BatchStartTimeout=60
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=8000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


SITE = """
export PATH={binaries}:$PATH CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
export GPUS_PER_NODE=0 TASKS_PER_NODE=1 CPUS_PER_TASK=1 SECONDS_TO_SAVE=30 MAX_WITHOUT_PROGRESS=1
export PRETRAIN_TIME=00:10:00
export REQUEUE={requeue}
"""
# Small enough to take seconds, long enough to be interrupted in the middle.
RUN = """
run_dir: {folder}/run
data:
  tokenizer: {folder}/tokenizer
  prefixes: [{folder}/pairs]
  kind: pairs
  sequence_length: 32
  split: "90,10,0"
model: {{layers: 2, hidden_size: 32, intermediate_size: 64}}
objective: {{stages: 4, threshold: 0.9}}
schedule: {{warmup_steps: 2}}
train: {{steps: 150, global_batch_size: 16, micro_batch_size: 4, log_interval: 5}}
checkpoint: {{interval: 20, keep: 50}}
evaluation: {{interval: 0}}
engine: {{deepspeed_config: ds_configs/cpu_debug.json}}
"""


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 400) -> None:
    """Wait until `condition` holds; fail after `seconds`, naming `what`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds} s for {what}")
        time.sleep(0.2)


@contextlib.contextmanager
def munge() -> Iterator[None]:
    """Make sure that munge, which SLURM authenticates by, is running."""
    if any(process.info["name"] == "munged" for process in psutil.process_iter(["name"])):
        yield
        return
    key = Path("/etc/munge/munge.key")
    if not key.exists():
        key.write_bytes(os.urandom(1024))
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    daemon = subprocess.Popen(
        ["setpriv", "--reuid=munge", "--regid=munge", "--clear-groups", "munged", "-F"],
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for("munge", lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, 20)
        yield
    finally:
        daemon.terminate()
        daemon.wait()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Start a controller and the nodes n1 and n2, and stop them by their pids in the end.

    Yields:
        The path of slurm.conf, for SLURM_CONF.
    """
    folder.mkdir(parents=True)
    (folder / "state").mkdir()
    controller, first, second = free_ports(3)
    path = folder / "slurm.conf"
    facts = {"folder": folder, "host": socket.gethostname().split(".")[0], "controller": controller}
    path.write_text(CONFIGURATION.format(**facts, first=first, second=second))
    environment = os.environ | {"SLURM_CONF": str(path)}
    daemons = [["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    started: list[subprocess.Popen[bytes]] = []
    with munge():
        try:
            for command in daemons:
                started.append(
                    subprocess.Popen([*command, "-f", str(path)], env=environment, stderr=subprocess.DEVNULL)
                )
            idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
            wait_for(
                "two idle nodes",
                lambda: (
                    subprocess.run(idle, env=environment, capture_output=True, text=True).stdout.split()
                    == ["2"]
                ),
                60,
            )
            yield path
        finally:
            subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
            for daemon in reversed(started):  # the nodes first
                daemon.send_signal(signal.SIGTERM)
                try:
                    daemon.wait(timeout=20)  # a node waits for its steps to end
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()


@dataclass
class Cluster:
    """A running SLURM and what to call it with."""

    checkout: Path
    environment: dict[str, str]

    def call(self, *command: str) -> str:
        """Return what a command prints; fail where it fails."""
        result = subprocess.run(
            command, env=self.environment, cwd=self.checkout, capture_output=True, text=True, timeout=400
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def python(self, *command: str) -> str:
        """Run a tool of the checkout."""
        return self.call(sys.executable, *command)

    def job(self, number: int | str) -> dict[str, str]:
        """Return what SLURM says of a job."""
        shown = self.call("scontrol", "show", "job", "-o", str(number)).splitlines()[0]
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def wait_state(self, number: int | str, *states: str, seconds: float = 600) -> dict[str, str]:
        """Wait until a job is in one of `states`, and return what SLURM says of it."""
        wait_for(f"job {number} to be {states}", lambda: self.job(number)["JobState"] in states, seconds)
        return self.job(number)

    def site(self, requeue: str) -> None:
        """Write slurm/site.env."""
        site = SITE.format(binaries=Path(sys.executable).parent, requeue=requeue)
        (self.checkout / "slurm/site.env").write_text(site)

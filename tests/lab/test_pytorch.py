# SPDX-License-Identifier: MIT
"""Real PyTorch jobs with a tenant's share, through gpulab-run on the guest, and what a second deploy thinks of them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import subprocess
import termios
import time
from collections.abc import Iterator

import pytest

import inventory
from rehearsal import host
from tests.lab.commands import INVENTORY, Deployed

RUN = ("gpulab-run", "--tenant", "astro")
GPU01 = ("--limit", "gpu01")
TENANT = "/srv/data/pytorch/tenants/astro"
#: Two processes average their gradients and add up their ranks.
DDP = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
total = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(total)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", total.item(), flush=True)
dist.destroy_process_group()
"""
#: Numbers that threads and random starts would make differ from run to run.
TRAINED = """
import torch

torch.manual_seed(7)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(model.parameters())
for _ in range(20):
    optimizer.zero_grad()
    loss = (model(torch.randn(256, 64)) ** 2).sum()
    loss.backward()
    optimizer.step()
print("loss", loss.item().hex(), hash("gpulab"), flush=True)
"""


def refused(*words: str) -> str:
    """What gpulab-run says when it refuses, which it does in one line and with status 2."""
    done = host.run("gpu01", list(words))
    assert done.returncode == 2, (words, done.stdout, done.stderr)
    assert done.stderr.startswith("gpulab-run: ") and done.stderr.count("\n") == 1
    return done.stderr


def log_of(deployed: Deployed, name: str) -> str:
    return deployed.on("gpu01", "cat", f"/var/log/gpulab/jobs/astro/{name}.log")


def jobs(deployed: Deployed) -> str:
    return deployed.on("gpu01", "docker", "ps", "--all", "--quiet", "--filter", "label=org.gpulab.job")


@pytest.fixture
def scripts(deployed: Deployed) -> None:
    for name, text in (("ddp.py", DDP), ("trained.py", TRAINED)):
        deployed.on("gpu01", "sh", "-c", 'printf %s "$1" > "$2"', "sh", text, f"{TENANT}/{name}")


@pytest.fixture
def ada(deployed: Deployed) -> Iterator[str]:
    """A user of the guest who is in no group of a tenant's yet."""
    deployed.on("gpu01", "useradd", "--create-home", "ada")
    yield "ada"
    deployed.on("gpu01", "userdel", "--remove", "ada")


class Terminal:
    """A command of the guest's at a terminal of its own, as over SSH."""

    def __init__(self, *words: str) -> None:
        self.end, inner = pty.openpty()
        self.said = ""
        self.process = subprocess.Popen(
            [*host.enter("gpu01"), *words], stdin=inner, stdout=inner, stderr=inner, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(inner)

    def wait_for(self, text: str, seconds: float = 60) -> None:
        """Until that stands in what is said from now on."""
        start, deadline = len(self.said), time.monotonic() + seconds
        while text not in self.said[start:]:
            assert time.monotonic() < deadline, self.said
            if select.select([self.end], [], [], 1)[0]:
                self.said += os.read(self.end, 4096).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self.end, keys.encode())

    def status(self) -> int:
        """Its exit status, once all that it still says has been read: what nobody reads would keep it."""
        while True:
            try:
                said = os.read(self.end, 4096)
            except OSError:
                break
            if not said:
                break
            self.said += said.decode(errors="replace")
        return self.process.wait(60)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.end)


@pytest.mark.usefixtures("scripts")
def test_torchrun_trains_on_two_workers_within_one_share(deployed: Deployed) -> None:
    said = deployed.on("gpu01", *RUN, "--workers", "2", "--name", "ddp", "--", "python", "ddp.py")
    assert "rank 0 of 2 sum 3.0" in said
    assert "rank 1 of 2 sum 3.0" in said
    assert "end ddp exit=0 simulated (rehearsal lab" in log_of(deployed, "ddp")


@pytest.mark.usefixtures("scripts")
def test_deterministic_job_has_the_same_numbers_each_time(deployed: Deployed) -> None:
    words = [*RUN, "--profile", "deterministic", "--", "python", "trained.py"]
    first, second = (re.findall("^loss .*", deployed.on("gpu01", *words), re.MULTILINE) for _ in range(2))
    assert first == second and len(first) == 1


def test_job_finds_the_locked_environment_and_its_limits(deployed: Deployed) -> None:
    code = """
import einops, getpass, json, os, torch
told = {name: os.environ[name] for name in ("GPULAB_TORCH_MEMORY_FRACTION", "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT")}
print("saw " + json.dumps([einops.__version__, torch.__version__, os.getuid(), getpass.getuser(), os.getcwd(), told]))
"""
    declared = json.loads(deployed.on("gpu01", "cat", "/etc/gpulab/pytorch.json"))["tenants"]["astro"]["shares"]
    for workers in (1, 2):
        words = ["--workers", str(workers), "--", "job.py"] if workers > 1 else ["--", "python", "job.py"]
        deployed.on("gpu01", "sh", "-c", 'printf %s "$1" > "$2"', "sh", code, f"{TENANT}/job.py")
        said = deployed.on("gpu01", *RUN, *words)
        saw = [json.loads(line.removeprefix("saw ")) for line in said.splitlines() if line.startswith("saw ")]
        share = {
            "GPULAB_TORCH_MEMORY_FRACTION": f"{declared[workers - 1]['fraction']:.6f}",
            "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={4096 // workers}M",
        }
        assert saw == workers * [["0.8.2", "2.13.0+cpu", 850, "astro", "/workspace", share]]


def test_log_of_a_tenants_own_lies_in_its_folder_and_is_its_jobs(deployed: Deployed) -> None:
    deployed.on("gpu01", *RUN, "--name", "own", "--log", "own.log", "--", "echo", "hello")
    lines = deployed.on("gpu01", "cat", f"{TENANT}/own.log").splitlines()
    assert "start own tenant=astro user=root" in lines[0] and "end own exit=0" in lines[-1]
    assert "hello" in lines
    assert deployed.on("gpu01", "stat", "--format=%u %G %a", f"{TENANT}/own.log").split() == [
        "850",
        "gpulab-astro",
        "640",
    ]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--tenant", "none", "--", "true"], "--tenant none: expected one of astro, ml"),
        (["--tenant", "astro"], "expected a command after --, or --shell"),
        (["--tenant", "astro", "--time-limit", "25h", "--", "true"], "--time-limit: expected at most 24h"),
        (["--tenant", "astro", "--workers", "5", "--", "x.py"], "--workers 5: expected 1 to 4"),
        (["--tenant", "ml", "--workers", "3", "--", "x.py"], "--workers 3: expected 1 to 2"),
        (["--tenant", "astro", "--workdir", "/etc", "--", "true"], "--workdir /etc: expected a folder below"),
        (["--tenant", "astro", "--workdir", "none", "--", "true"], "--workdir none: there is no folder"),
        (["--tenant", "astro", "--log", "/var/log/x", "--", "true"], "--log /var/log/x: expected a file below"),
        (["--tenant", "astro", "--profile", "fast", "--", "true"], "no profile fast; there are deterministic"),
        (["--tenant", "astro", "--shell"], "--shell: expected a terminal"),
        (["--stop", "ollama"], "--stop ollama: no such job of yours runs"),
    ],
)
def test_what_gpulab_run_refuses(deployed: Deployed, words: list[str], why: str) -> None:
    assert why in refused("sh", "-c", 'exec gpulab-run "$@" < /dev/null', "sh", *words)


def test_tenant_without_a_share_runs_nothing(deployed: Deployed) -> None:
    tenants = inventory.load(INVENTORY).guests["gpu01"].tenants
    without = [{"name": each.name, "active_thread_percentage": 50} for each in tenants]
    assert deployed.deploy(*GPU01, "--data", f"tenants={json.dumps(without)}").status == 0
    try:
        assert "astro has no `memory_limit_mib` in the inventory" in refused(*RUN, "--", "true")
    finally:
        assert deployed.deploy(*GPU01).status == 0


def test_user_runs_jobs_of_the_tenants_whose_groups_have_her(deployed: Deployed, ada: str) -> None:
    def asks(words: str) -> tuple[str, ...]:
        return "su", "-", ada, "-c", f"sudo -n gpulab-run {words}"

    assert host.run("gpu01", list(asks("--tenant astro -- true"))).returncode != 0
    deployed.on("gpu01", "usermod", "--append", "--groups", "gpulab-astro", ada)
    deployed.on("gpu01", *asks("--tenant astro --name hers -- true"))
    assert "user=ada" in log_of(deployed, "hers")
    # What a job makes is hers, too.
    deployed.on("gpu01", *asks("--tenant astro -- mkdir made"))
    deployed.on("gpu01", "su", "-", ada, "-c", f"touch {TENANT}/made/file && rm -r {TENANT}/made")
    assert "ada is not in the group gpulab-ml (an admin: usermod" in refused(*asks("--tenant ml -- true"))
    assert "--tenant none: expected one of astro, ml" in refused(*asks("--tenant none -- true"))
    # She reads the logs of her tenant, sees its jobs alone, and ends no others.
    deployed.on("gpu01", "su", "-", ada, "-c", "cat /var/log/gpulab/jobs/astro/hers.log")
    assert host.run("gpu01", ["su", "-", ada, "-c", "ls /var/log/gpulab/jobs/ml"]).returncode != 0
    words = [
        *host.enter("gpu01"),
        "gpulab-run",
        "--tenant",
        "ml",
        "--name",
        "theirs",
        "--",
        "sh",
        "-c",
        "echo on; sleep 99",
    ]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and any(line == "on\n" for line in other.stdout)
    assert "theirs" not in deployed.on("gpu01", *asks("--list"))
    assert "no such job of yours runs" in refused(*asks("--stop theirs"))
    assert "theirs\tml\tUp" in deployed.on("gpu01", "gpulab-run", "--list")
    deployed.on("gpu01", "gpulab-run", "--stop", "theirs")
    assert other.wait(60) == 143


def test_second_job_waits_or_is_refused(deployed: Deployed) -> None:
    words = [*host.enter("gpu01"), *RUN, "--name", "first", "--", "sh", "-c", "echo on; sleep 5"]
    first = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and any(line == "on\n" for line in first.stdout)
    assert "a job of astro runs already" in refused(*RUN, "--no-wait", "--", "true")
    second = host.run("gpu01", [*RUN, "--", "echo", "second"])
    assert (second.returncode, first.wait(10)) == (0, 0)
    assert "waiting: a job of astro runs" in second.stderr and "second" in second.stdout


def test_container_that_never_started_is_not_in_the_way(deployed: Deployed) -> None:
    image = json.loads(deployed.on("gpu01", "cat", "/etc/gpulab/pytorch.json"))["image"]
    deployed.on("gpu01", "docker", "create", "--name", "gpulab-job-astro", image, "true")
    deployed.on("gpu01", *RUN, "--", "true")
    assert jobs(deployed) == ""


def test_job_over_its_time_limit_ends(deployed: Deployed) -> None:
    began = time.monotonic()
    done = host.run("gpu01", [*RUN, "--time-limit", "2s", "--name", "late", "--", "sleep", "100"])
    assert (done.returncode, jobs(deployed)) == (124, "")
    assert "time limit: late is told to end" in done.stderr
    assert time.monotonic() - began < 60
    assert "end late exit=124 (time limit)" in log_of(deployed, "late")


def test_shell_at_a_terminal_has_a_prompt_and_its_own_exit_status(deployed: Deployed) -> None:
    shell = Terminal(*RUN, "--shell", "--name", "shell")
    shell.wait_for("astro@job:/workspace$ ")
    shell.type("python -c 'import torch; print(torch.ones(3).sum())'\n")
    shell.wait_for("tensor(3.)")
    # An interrupt is the command's, not the job's.
    shell.type("sleep 99\n")
    shell.wait_for("sleep 99")
    time.sleep(1)
    shell.type("\x03")
    shell.wait_for("astro@job:/workspace$ ")
    shell.type("exit 7\n")
    assert shell.status() == 7
    shell.close()
    assert "end shell exit=7" in log_of(deployed, "shell")
    assert jobs(deployed) == ""


def test_shell_ends_with_its_input(deployed: Deployed) -> None:
    shell = Terminal(*RUN, "--shell")
    shell.wait_for("astro@job:/workspace$ ")
    shell.type("\x04")
    assert shell.status() == 0
    shell.close()
    assert jobs(deployed) == ""


def test_shell_ends_with_its_terminal_and_its_time(deployed: Deployed) -> None:
    closed = Terminal(*RUN, "--shell", "--name", "closed")
    closed.wait_for("astro@job:/workspace$ ")
    closed.close()
    closed.process.wait(60)
    # It is its turn once the other has gone.
    late = Terminal(*RUN, "--shell", "--time-limit", "3s")
    late.wait_for("astro@job:/workspace$ ")
    assert late.status() == 124
    late.close()
    assert "time limit" in late.said
    assert "end closed exit=" in log_of(deployed, "closed")
    assert jobs(deployed) == ""


def test_deploy_heals_a_lost_folder_and_the_next_changes_nothing(deployed: Deployed) -> None:
    deployed.on("gpu01", "rm", "-r", "/var/log/gpulab/jobs/astro")
    assert "/var/log/gpulab/jobs/astro/lost.log: No such file" in refused(*RUN, "--name", "lost", "--", "true")
    for _ in range(2):
        done = deployed.deploy(*GPU01)
        assert done.status == 0, done.output[-3000:]
    assert deployed.changed() == []

# SPDX-License-Identifier: MIT
"""Real PyTorch jobs with a tenant's share, through gpulab-run on the guest, and what a second deploy thinks of them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from inventory import GpulabError

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


def fails(deployed: Any, *words: str) -> str:
    with pytest.raises((AssertionError, GpulabError)) as raised:
        deployed.on("gpu01", *words)
    return str(raised.value)


def test_torchrun_trains_on_two_workers_within_one_share(deployed: Any) -> None:
    deployed.on("gpu01", "sh", "-c", 'printf %s "$1" > "$2"', "sh", DDP, f"{TENANT}/ddp.py")
    said = deployed.on("gpu01", *RUN, "--workers", "2", "--name", "ddp", "--", "python", "ddp.py")
    assert "rank 0 of 2 sum 3.0" in said
    assert "rank 1 of 2 sum 3.0" in said
    log = deployed.on("gpu01", "cat", "/var/log/gpulab/jobs/astro/ddp.log")
    assert "end ddp exit=0 simulated (rehearsal lab" in log


def test_job_finds_the_locked_environment_and_its_limits(deployed: Any) -> None:
    code = (
        "import einops, os, torch; print(einops.__version__, torch.are_deterministic_algorithms_enabled(), "
        "os.getuid(), os.environ['CUDA_MPS_PINNED_DEVICE_MEM_LIMIT'])"
    )
    said = deployed.on("gpu01", *RUN, "--profile", "deterministic", "--", "python", "-c", code)
    assert "0.8.2 True 850 0=4096M" in said


def test_what_gpulab_run_refuses(deployed: Any) -> None:
    assert "has no `memory_limit_mib`" in fails(deployed, "gpulab-run", "--tenant", "ml", "--", "true")
    deployed.on("gpu01", "useradd", "--create-home", "ada")
    asked = ("su", "-", "ada", "-c", "sudo -n gpulab-run --tenant astro -- true")
    fails(deployed, *asked)
    deployed.on("gpu01", "usermod", "--append", "--groups", "gpulab-astro", "ada")
    deployed.on("gpu01", *asked)
    assert "is not in the group gpulab-ml" in fails(
        deployed, "su", "-", "ada", "-c", "sudo -n gpulab-run --tenant ml -- true"
    )


def test_job_over_its_time_limit_ends(deployed: Any) -> None:
    began = time.monotonic()
    fails(deployed, *RUN, "--time-limit", "2s", "--name", "late", "--", "sleep", "100")
    assert time.monotonic() - began < 60
    assert "end late exit=124 (time limit)" in deployed.on("gpu01", "cat", "/var/log/gpulab/jobs/astro/late.log")


def test_deploy_heals_a_lost_folder_and_the_next_changes_nothing(deployed: Any) -> None:
    deployed.on("gpu01", "rm", "-r", "/var/log/gpulab/jobs/astro")
    for _ in range(2):
        done = deployed.deploy(*GPU01)
        assert done.status == 0, done.output[-3000:]
    assert deployed.changed() == []

# SPDX-License-Identifier: MIT
"""PyTorch jobs: the declared image and environment, a tenant's share, and no right too many, as a job sees them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory import Guest
from inventory.budgets import torch_memory_fraction
from inventory.cards import Card
from inventory.services import PyTorch
from verify.containers.running import answering
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("pytorch")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: gpulab-run's word for a busy tenant.
BUSY = "runs already"
MIB = 1 << 20
#: What every environment has of its own.
OF_VENV = ("pip", "setuptools")


@pytest.mark.critical
@pytest.mark.promise("containers.pytorch.image", "services.pytorch.image", fix=DEPLOY)
def test_image_of_jobs_is_there(
    guest: Guest, containers: Observation, pytorch: Observation, seen: Callable[[str], None]
) -> None:
    answering(containers)
    digest = declared(guest).image.partition("@")[2]
    digests = [each.partition("@")[2] for each in pytorch["digests"]]
    assert digest in digests, f"{guest.name}: the image {digest} of PyTorch jobs is missing, expected it to be there"
    seen(digest)


@pytest.mark.critical
@pytest.mark.promise(
    "containers.pytorch.job",
    "services.pytorch.image",
    "tenants",
    fix=DEPLOY + "; gpulab-run --list on {host} shows what runs",
)
def test_tenant_runs_a_job(
    guest: Guest, containers: Observation, pytorch: Observation, seen: Callable[[str], None]
) -> None:
    answering(containers)
    job = asked(pytorch)
    said = " ".join(job["said"].split())[-200:]
    assert job["saw"] is not None, f"{guest.name}: a job ended with {job['status']}: {said or 'it said nothing'}"
    assert job["status"] == 0, f"{guest.name}: a job that did its work ended with {job['status']}, expected 0"
    seen(f"torch {job['saw']['torch']}")


@pytest.mark.major
@pytest.mark.promise("containers.pytorch.environment", "services.pytorch.lock", fix=DEPLOY)
def test_environment_is_as_locked(guest: Guest, pytorch: Observation, seen: Callable[[str], None]) -> None:
    wanted, found = locked(declared(guest).lock), saw(pytorch)["versions"]
    assert not (more := sorted({*saw(pytorch)["own"]} - {*wanted, *OF_VENV})), (
        f"{guest.name}: the environment has {', '.join(more)}, which the lock does not name"
    )
    changed = ", ".join(saw(pytorch)["changed"])
    assert not changed, f"{guest.name}: files of the environment are not those of their packages: {changed}"
    wrong = [
        f"{name} {found.get(name, 'absent')} (locked {version})"
        for name, version in wanted.items()
        if found.get(name) != version
    ]
    assert not wrong, f"{guest.name}: a job finds {', '.join(wrong)}"
    seen(", ".join(f"{name} {version}" for name, version in wanted.items()) or "the image's own packages")


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.pytorch.cuda", "gpu", fix=DEPLOY)
def test_job_computes_on_the_gpu(guest: Guest, pytorch: Observation, seen: Callable[[str], None]) -> None:
    found = saw(pytorch)
    if not found["cuda"]:
        not_run(f"no CUDA build: torch {found['torch']}")
    assert found["devices"] == 1, f"{guest.name}: a job sees {found['devices']} GPUs, expected 1"
    assert not found["computed"], (
        f"{guest.name}: a product of two matrices on the GPU ends with {found['computed']}, expected the right one"
    )
    seen(f"CUDA {found['cuda']}, a product of two matrices")


@pytest.mark.major
@pytest.mark.promise(
    "containers.pytorch.limits", "tenants.memory_limit_mib", "services.pytorch.host_memory_mib", fix=DEPLOY
)
def test_job_has_its_tenants_share(guest: Guest, card: Card, pytorch: Observation, seen: Callable[[str], None]) -> None:
    found, service = saw(pytorch), declared(guest)
    tenant = next(each for each in guest.tenants if each.memory_limit_mib and each.may_use("pytorch"))
    budget = tenant.memory_limit_mib or 0
    expected: dict[str, str | None] = {
        "GPULAB_TORCH_MEMORY_FRACTION": f"{torch_memory_fraction(budget, card.memory_mib):.6f}",
        "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT": f"0={budget}M" if guest.nvidia.sharing == "mps" else None,
    }
    for key, value in expected.items():
        assert found["environment"][key] == value, (
            f"{guest.name}: a job of {tenant.name} has {key}={found['environment'][key]}, expected {value}"
        )
    most = str(service.host_memory_mib * MIB) if service.host_memory_mib else "max"
    assert found["memory_max"] in ("", most), (
        f"{guest.name}: a job's main memory is limited to {found['memory_max']}, expected {most}"
    )
    seen(f"{budget} MiB of the card, fraction {expected['GPULAB_TORCH_MEMORY_FRACTION']}")


@pytest.mark.major
@pytest.mark.promise("containers.pytorch.rights", "nvidia.service_uid", fix=DEPLOY)
def test_job_has_no_right_too_many(guest: Guest, pytorch: Observation, seen: Callable[[str], None]) -> None:
    found, uid = saw(pytorch), guest.nvidia.service_uid
    excess = [
        text
        for text, wrong in (
            (f"runs as user {found['uid']}, expected {uid}", found["uid"] != uid),
            (f"has the capabilities {found['capabilities']:x}, expected none", found["capabilities"]),
            ("may gain privileges", not found["no_new_privileges"]),
            ("can write the image's files", found["root_writable"]),
        )
        if wrong
    ]
    assert not excess, f"{guest.name}: a job {'; '.join(excess)}"
    seen(f"user {uid}, no capabilities, read-only root")


def declared(guest: Guest) -> PyTorch:
    """The guest's declaration; `on("pytorch")` has seen to it that there is one."""
    service = guest.services.pytorch
    if service is None:
        not_run("no PyTorch is declared")
    return service


def asked(pytorch: Observation) -> dict[str, Any]:
    """The job; the check is not run where no tenant has a share, or a job of the tenant's runs."""
    job: dict[str, Any] | None = pytorch["job"]
    if job is None:
        not_run("no tenant has a `memory_limit_mib`, so that nobody can run a job")
    if job["saw"] is None and BUSY in job["said"]:
        not_run("a job of the tenant's runs")
    return job


def saw(pytorch: Observation) -> dict[str, Any]:
    """What the job saw; the check is not run where it saw nothing."""
    found: dict[str, Any] | None = asked(pytorch)["saw"]
    if found is None:
        not_run("no job ran: see containers.pytorch.job")
    return found


def locked(path: str | None) -> dict[str, str]:
    """Name to version of a lock file."""
    if path is None:
        return {}
    pairs = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", Path(path).expanduser().read_text(), re.MULTILINE)
    return {re.sub("[-_.]+", "-", name).lower(): version for name, version in pairs}

# SPDX-License-Identifier: MIT
"""Do the GPU's users share it as declared, and nobody else?"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from inventory.cards import Card
from inventory.sharing import PIPE_DIRECTORY, SERVICE_USER, TENANTS, client
from verify.nvidia.test_gpu import the_gpu
from verify.observations import Observation
from verify.verdicts import not_run

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
RESTART = "systemctl restart gpulab-mps on {host}; then " + DEPLOY


@pytest.mark.on("mps")
@pytest.mark.critical
@pytest.mark.promise("nvidia.mps.daemon", "nvidia.sharing", fix=DEPLOY)
def test_mps_answers_and_comes_back_after_a_boot(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    the_gpu(card, nvidia)
    mps, unit = nvidia["mps"], nvidia["units"]["gpulab-mps.service"]
    assert mps is not None, f"{guest.name}: nvidia-cuda-mps-control is not installed"
    assert mps["percentage"]["status"] == 0, (
        f"{guest.name}: the MPS daemon says {mps['percentage']['says'] or 'nothing'}, expected an answer"
    )
    assert unit["enabled"] == "enabled", (
        f"{guest.name}: gpulab-mps.service is {unit['enabled'] or 'absent'}, expected enabled"
    )
    seen("it answers, and its unit is enabled")


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise(
    "nvidia.mps.limits", "nvidia.mps.active_thread_percentage", "nvidia.mps.pinned_memory_limit_mib", fix=DEPLOY
)
def test_mps_keeps_the_declared_limits(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    mps, limits = answering(card, nvidia), guest.nvidia.mps
    told = mps["percentage"]["says"]
    assert re.fullmatch(r"[0-9.]+", told) and float(told) == limits.active_thread_percentage, (
        f"{guest.name}: MPS gives each client {told or 'no'} percent of the SMs, "
        f"expected {limits.active_thread_percentage}"
    )
    memory = mps["memory"]["says"]
    assert memory in memory_words(limits.pinned_memory_limit_mib), (
        f"{guest.name}: MPS lets each client pin {memory or 'all memory'}, "
        f"expected {f'{limits.pinned_memory_limit_mib} MiB' if limits.pinned_memory_limit_mib else 'all memory'}"
    )
    seen(f"{told} percent, {memory or 'all memory'}")


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise("nvidia.mps.server", "nvidia.service_uid", fix=RESTART)
def test_server_of_the_service_user_runs(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    servers = answering(card, nvidia)["servers"]
    if not servers and nvidia.simulated:
        not_run("MPS' server does not run without a real GPU")
    if not servers and the_gpu(card, nvidia)["work"]["error"]:
        not_run("no client got on, and the first one starts the server")
    assert servers, f"{guest.name}: MPS has no server, expected one of uid {guest.nvidia.service_uid}"
    uids = sorted({str(server["uid"]) for server in servers})
    assert uids == [str(guest.nvidia.service_uid)], (
        f"{guest.name}: MPS' server serves uid {', '.join(uids)}, "
        f"expected {guest.nvidia.service_uid} ({SERVICE_USER}): all others wait until it ends"
    )
    seen(f"pid {servers[0]['pid']}")


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise("nvidia.mps.closed", "nvidia.service_uid", fix=DEPLOY)
def test_stranger_is_refused_at_once(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    stranger = answering(card, nvidia)["stranger"]
    assert stranger["status"] is not None, (
        f"{guest.name}: user nobody is kept waiting by MPS in {PIPE_DIRECTORY}, expected a refusal"
    )
    assert stranger["status"] != 0, (
        f"{guest.name}: user nobody reaches MPS in {PIPE_DIRECTORY}, expected a folder that is closed to others"
    )
    seen(stranger["says"].splitlines()[0] if stranger["says"] else "")


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise(
    "nvidia.mps.tenants", "tenants.active_thread_percentage", "tenants.memory_limit_mib", "tenants.priority", fix=DEPLOY
)
def test_tenants_have_their_profiles(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    found = nvidia["tenants"]
    wanted = {tenant.name: dict(client(guest, tenant).environment) for tenant in guest.tenants}
    for name in sorted(wanted.keys() | found.keys()):
        where = f"{guest.name}: {TENANTS}/{name}.env"
        assert name in found, f"{where} is missing, expected the profile of tenant {name}"
        assert name in wanted, f"{where} is there, and no tenant of that name is declared"
        differing = sorted(key for key in wanted[name].keys() | found[name].keys() if differs(key, wanted, found, name))
        assert not differing, (
            f"{where}: {differing[0]} is {found[name].get(differing[0], 'unset')}, "
            f"expected {wanted[name].get(differing[0], 'unset')}"
        )
    seen(", ".join(wanted) or "none declared")


def differs(key: str, wanted: dict[str, dict[str, str]], found: dict[str, dict[str, str]], name: str) -> bool:
    return wanted[name].get(key) != found[name].get(key)


@pytest.mark.on("mps")
@pytest.mark.major
@pytest.mark.promise(
    "nvidia.mps.uid", "nvidia.service_uid", fix="end these processes on {host}; containers of ours: " + DEPLOY
)
def test_every_client_runs_as_the_service_user(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    users = the_gpu(card, nvidia)["processes"]
    foreign = [f"{user['name']} ({user['pid']}, uid {user['uid']})" for user in users if not ours(guest, user)]
    assert not foreign, (
        f"{guest.name}: {', '.join(foreign)} on the GPU, expected uid {guest.nvidia.service_uid} ({SERVICE_USER}) alone"
    )
    seen(", ".join(user["name"] for user in users) or "nobody uses it now")


def ours(guest: Guest, user: dict[str, Any]) -> bool:
    return bool(user["uid"] == guest.nvidia.service_uid)


@pytest.mark.on("no_mps")
@pytest.mark.major
@pytest.mark.promise("nvidia.mps.off", "nvidia.sharing", fix=DEPLOY)
def test_no_mps_daemon_runs(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    daemons = (nvidia["mps"] or {"daemons": []})["daemons"]
    assert not daemons, (
        f"{guest.name}: an MPS control daemon runs (pid {daemons[0]}), expected none with sharing by "
        f"{guest.nvidia.sharing}"
    )
    unit = nvidia["units"]["gpulab-mps.service"]
    assert unit["enabled"] != "enabled", f"{guest.name}: gpulab-mps.service is enabled, expected none"
    seen("none")


def answering(card: Card, nvidia: Observation) -> dict[str, Any]:
    """The MPS daemon's answers; the check is not run without them."""
    the_gpu(card, nvidia)
    mps: dict[str, Any] | None = nvidia["mps"]
    if mps is None or mps["percentage"]["status"] != 0:
        not_run("the MPS daemon does not answer")
    return mps


def memory_words(mib: int | None) -> set[str]:
    """How MPS may tell a limit: from 1 GiB on in whole GiB, rounded down; nothing where there is none."""
    if mib is None:
        return {""}
    return {f"{mib}M", f"{mib // 1024}G"} if mib >= 1024 else {f"{mib}M"}

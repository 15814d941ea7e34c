# SPDX-License-Identifier: MIT
"""Who uses the card's memory now, and does everyone keep to the declared share?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from inventory import Guest
from inventory.budgets import budgets
from verify.containers.running import answering
from verify.observations import Observation
from verify.verdicts import inconclusive

pytestmark = [pytest.mark.on("gpus"), pytest.mark.usefixtures("guest_sees_gpu")]

#: MPS' own server: its memory is nobody's share.
MPS_SERVER = "nvidia-cuda-mps-server"
#: Verify's own containers.
OURS = "gpulab-verify"


@pytest.mark.major
@pytest.mark.promise(
    "containers.{share}.budget",
    "budgets.{share}",
    fix="nvidia-smi on {host} shows its processes; lower what it may take, or raise its budget in {lab} and deploy",
)
def test_share_of_the_card_is_kept(
    guest: Guest, share: str, nvidia: Observation, containers: Observation, seen: Callable[[str], None]
) -> None:
    most = next(each.memory_mib for each in budgets(guest) if each.key.removeprefix("services.") == share)
    using = [each for each in users(nvidia, containers) if each["share"] == share]
    unknown = [each for each in using if each["memory_mib"] is None]
    if unknown:
        inconclusive(f"NVML does not say how much memory {told(unknown)} takes")
    total = sum(each["memory_mib"] for each in using)
    assert total <= most, f"{guest.name}: {share} takes {total} MiB of the card: {told(using)}; expected at most {most}"
    seen(f"{total} MiB of {most} MiB{': ' if using else ''}{told(using)}")


@pytest.mark.minor
@pytest.mark.promise("containers.card.foreign", fix="end them on {host}, or declare a budget for them in {lab}")
def test_nobody_undeclared_uses_the_card(
    guest: Guest, nvidia: Observation, containers: Observation, seen: Callable[[str], None]
) -> None:
    declared = {each.key.removeprefix("services.") for each in budgets(guest)}
    using = users(nvidia, containers)
    foreign = [each for each in using if each["share"] not in declared]
    assert not foreign, (
        f"{guest.name}: {told(foreign)} on the card, expected processes of {', '.join(sorted(declared)) or 'nobody'}"
    )
    seen(told(using) or "nobody uses it now")


def users(nvidia: Observation, containers: Observation) -> list[dict[str, Any]]:
    """The processes on the card with the share that each one counts to, and the container's name.

    Under MPS the clients' memory is their own, and the server is none of them.
    """
    answering(containers)
    known = {each["id"]: each for each in containers["data"]["containers"]}
    found = [each for gpu in nvidia["nvml"]["gpus"] for each in gpu["processes"] if each["name"] != MPS_SERVER]
    placed = [{**each, **place(each["cgroup"], known)} for each in found]
    return [each for each in placed if each["container"] != OURS]


def place(cgroup: str, known: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """`share` and `container` of a process; both empty outside of containers, the share alone in one of others."""
    id_ = next(iter(re.findall(r"[0-9a-f]{64}", cgroup)), "")
    container = known.get(id_)
    if container is None:
        return {"share": "", "container": id_[:12]}
    tenant = container["tenant"]
    return {"share": f"tenants.{tenant}" if tenant else container["service"], "container": container["name"]}


def told(processes: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{each['name']} ({each['pid']}{', in ' + each['container'] if each['container'] else ''}, "
        f"{'?' if each['memory_mib'] is None else each['memory_mib']} MiB)"
        for each in processes
    )

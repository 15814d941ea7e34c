# SPDX-License-Identifier: MIT
"""Is the guest's GPU the declared card, and is it healthy? All of it as NVML says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from inventory.cards import Card
from verify.observations import Observation
from verify.verdicts import inconclusive, not_run

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
REBOOT = "qm reboot the VM of {host} on {node}; if it comes back, the card or its slot"
#: Xids that speak of the application that ran, not of the card (NVIDIA's Xid catalogue).
OF_APPLICATIONS = {13, 31, 43, 45}
#: Share of the memory by which NVML's total may differ from the card table.
MEMORY_TOLERANCE = 0.01
#: Share of the memory that is left when ECC keeps its bits in it.
WITH_ECC = 0.93


@pytest.mark.critical
@pytest.mark.promise("nvidia.gpu.visible", fix=DEPLOY)
def test_declared_card_is_visible(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    if nvidia["loaded"] is None:
        not_run("no driver is loaded")
    nvml = nvidia["nvml"]
    assert nvml["error"] is None, f"{guest.name}: NVML: {nvml['error']}; expected {card.name}"
    found = [gpu for gpu in nvml["gpus"] if gpu["id"] == card.functions[0]]
    shown = ", ".join(f"{gpu['name']} ({gpu['id']})" for gpu in nvml["gpus"]) or "no GPU"
    assert found, f"{guest.name}: NVML shows {shown}, expected {card.name} ({card.functions[0]})"
    seen(f"{found[0]['name']} at {found[0]['bus']}, {found[0]['memory_mib']} MiB")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.memory", fix=REBOOT)
def test_card_has_all_its_memory(guest: Guest, card: Card, nvidia: Observation) -> None:
    gpu = the_gpu(card, nvidia)
    least = card.memory_mib * (WITH_ECC if gpu["ecc"] else 1 - MEMORY_TOLERANCE)
    most = card.memory_mib * (1 + MEMORY_TOLERANCE)
    total = answered(gpu, "memory_mib", "the memory")
    assert least <= total <= most, (
        f"{guest.name}: {total} MiB on {gpu['name']}, expected {card.memory_mib} MiB"
        f"{' less what ECC takes' if gpu['ecc'] else ''}"
    )


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.link", fix="seat the card of {host} anew in {node}, in a slot with all lanes")
def test_link_has_all_its_lanes(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    # The generation falls at idle to save power, so only the width can be judged here.
    gpu = the_gpu(card, nvidia)
    width = answered(gpu, "link_width", "the link's width")
    assert width >= card.link_width, (
        f"{guest.name}: {gpu['name']} has a PCIe link of x{width}, expected x{card.link_width}; "
        "is the slot electrically narrower, or the card not seated?"
    )
    seen(f"x{width}, generation {gpu['link_generation']} now")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.persistence", fix=DEPLOY)
def test_persistence_mode_is_as_declared(guest: Guest, card: Card, nvidia: Observation) -> None:
    gpu = the_gpu(card, nvidia)
    mode = bool(answered(gpu, "persistence", "persistence mode"))
    assert mode == guest.nvidia.persistence, (
        f"{guest.name}: persistence mode is {'on' if mode else 'off'}, "
        f"expected {'on' if guest.nvidia.persistence else 'off'}"
    )


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.memory_health", fix=REBOOT)
def test_memory_of_the_card_is_sound(guest: Guest, card: Card, nvidia: Observation) -> None:
    gpu = the_gpu(card, nvidia)
    if gpu["ecc"]:
        errors = answered(gpu, "ecc_uncorrected", "ECC errors")
        assert errors == 0, f"{guest.name}: {errors} uncorrected ECC errors on {gpu['name']}, expected 0"
    uncorrectable, pending, failure = gpu["remapped"] or (0, 0, 0)
    assert not (pending or failure), (
        f"{guest.name}: {uncorrectable} remapped rows on {gpu['name']}, "
        f"{'a remapping failed' if failure else 'one waits for a reset'}; expected neither"
    )


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.xid", fix=REBOOT)
def test_kernel_saw_no_error_of_the_card(guest: Guest, nvidia: Observation) -> None:
    found = [number for number in nvidia["xids"] if number not in OF_APPLICATIONS]
    assert not found, (
        f"{guest.name}: the kernel log since boot has Xid {', '.join(map(str, found))}, expected none of the hardware; "
        "see NVIDIA's Xid catalogue"
    )


def the_gpu(card: Card, nvidia: Observation) -> dict[str, Any]:
    """The declared card as NVML shows it; the check is not run without it."""
    gpu: dict[str, Any]
    for gpu in nvidia["nvml"]["gpus"]:
        if gpu["id"] == card.functions[0]:
            return gpu
    not_run("the GPU is not visible")


def answered(gpu: dict[str, Any], key: str, what: str) -> Any:
    """A value of NVML; without one the check cannot tell."""
    if gpu[key] is None:
        inconclusive(f"{gpu['name']} or its driver does not answer for {what}")
    return gpu[key]

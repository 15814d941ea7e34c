# SPDX-License-Identifier: MIT
"""Is the guest's GPU the declared card, and is it healthy? All of it as NVML says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from inventory.cards import Card
from verify.observations import Observation
from verify.verdicts import Broken, inconclusive, not_run

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
REBOOT = "qm reboot the VM of {host} on {node}; if it comes back, the card or its slot"
#: Xids that speak of the application that ran, not of the card (NVIDIA's Xid catalogue).
OF_APPLICATIONS = {13, 31, 43, 45}
SETTINGS = "systemctl restart gpulab-gpu-settings on {host}; then " + DEPLOY
STOP = "stop and start the VM of {host} on {node}; if it comes back, the card or its slot"
SEAT = "seat the card of {host} anew in {node}, in a slot with all lanes"
#: Event reasons that are no part of ordinary work (nvml.h); rest, the power limit and declared clocks are.
SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "external power brake",
}
#: The reason that the power limit is, which is no slowdown.
POWER_LIMIT = 0x4
#: NVML's numbers of compute modes.
DEFAULT, EXCLUSIVE_PROCESS = 0, 3
MODES = {DEFAULT: "DEFAULT", 2: "PROHIBITED", EXCLUSIVE_PROCESS: "EXCLUSIVE_PROCESS"}
#: MHz: the card rounds a locked clock to its own steps.
CLOCK_STEP = 15
#: Share of the memory by which NVML's total may differ from the card table.
MEMORY_TOLERANCE = 0.01
#: Share of the memory that is left when ECC keeps its bits in it.
WITH_ECC = 0.93


@pytest.mark.critical
@pytest.mark.promise("nvidia.gpu.visible", "gpu", "card.name", fix=DEPLOY)
def test_declared_card_is_visible(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    told = last_words(nvidia)
    if not nvidia["on_bus"]:
        why = f"the kernel log has {told}" if told else "was the VM started without it, or is its mapping missing?"
        message = f"{guest.name}: no NVIDIA GPU on the guest's PCI bus, expected {card.name}; {why}"
        raise Broken(message, STOP if told else DEPLOY)
    if nvidia["loaded"] is None:
        not_run("no driver is loaded")
    nvml = nvidia["nvml"]
    if nvml["error"] is not None and told:
        raise Broken(f"{guest.name}: NVML: {nvml['error']}; the kernel log has {told}", STOP)
    assert nvml["error"] is None, f"{guest.name}: NVML: {nvml['error']}; expected {card.name}"
    found = [gpu for gpu in nvml["gpus"] if gpu["id"] == card.functions[0]]
    shown = ", ".join(f"{gpu['name']} ({gpu['id']})" for gpu in nvml["gpus"]) or "no GPU"
    assert found, f"{guest.name}: NVML shows {shown}, expected {card.name} ({card.functions[0]})"
    seen(f"{found[0]['name']} at {found[0]['bus']}, {found[0]['memory_mib']} MiB")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.memory", "card.memory_mib", "nvidia.ecc", fix=REBOOT)
def test_card_has_all_its_memory(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu = the_gpu(card, nvidia)
    least = card.memory_mib * (WITH_ECC if gpu["ecc"] else 1 - MEMORY_TOLERANCE)
    most = card.memory_mib * (1 + MEMORY_TOLERANCE)
    total = answered(gpu, "memory_mib", "the memory")
    assert least <= total <= most, (
        f"{guest.name}: {total} MiB on {gpu['name']}, expected {card.memory_mib} MiB"
        f"{' less what ECC takes' if gpu['ecc'] else ''}"
    )
    seen(f"{total} MiB")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.link", "card.link_width", fix=SEAT)
def test_link_has_all_its_lanes(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    # Lanes, too, may be put to rest with a card that has nothing to do.
    gpu = the_gpu(card, nvidia)
    work = working(gpu)
    width = answered(work | {"name": gpu["name"]}, "width", "the link's width")
    if width < card.link_width:
        at_rest(guest, work, f"link of x{width}")
    assert width >= card.link_width, (
        f"{guest.name}: {gpu['name']} has a PCIe link of x{width} under load, expected x{card.link_width}; "
        "is the slot electrically narrower, or the card not seated?"
    )
    seen(f"x{width} under load")


@pytest.mark.critical
@pytest.mark.promise("nvidia.gpu.client", "nvidia.sharing", fix=DEPLOY)
def test_client_gets_the_card(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    """A second of copies, as a service does them: by its user and through MPS where there is one."""
    gpu = the_gpu(card, nvidia)
    work, mps = gpu["work"], nvidia["mps"]
    if guest.nvidia.sharing == "mps" and (mps is None or mps["percentage"]["status"] != 0):
        not_run("the MPS daemon does not answer")
    assert not work["error"], f"{guest.name}: a client of {gpu['name']} did not get on: {work['error']}"
    seen(f"it is used by {', '.join(work['by'])}" if work["by"] else "64 MiB to the card and back, for a second")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.link.generation", "card.link_generation", fix=SEAT)
def test_link_is_fast_under_load(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    # At rest the generation falls to save power.
    gpu = the_gpu(card, nvidia)
    work = working(gpu)
    generation = answered(work | {"name": gpu["name"]}, "generation", "the link's generation")
    least = card.link_generation
    if generation < least:
        at_rest(guest, work, f"link generation {generation}")
    assert generation >= least, (
        f"{guest.name}: the PCIe link of {gpu['name']} is of generation {generation} under load, expected {least}; "
        "is the slot older, or a riser in between?"
    )
    seen(f"generation {generation} under load")


@pytest.mark.minor
@pytest.mark.promise("nvidia.gpu.replay", fix=SEAT)
def test_link_sends_nothing_twice(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu = the_gpu(card, nvidia)
    before, after = gpu["replays"]
    if before is None or after is None:
        inconclusive(f"{gpu['name']} or its driver does not answer for the replay counter")
    assert after == before, (
        f"{guest.name}: the PCIe link of {gpu['name']} repeated {after - before} packets within a second of load, "
        "expected none"
    )
    seen(f"{after} since the driver was loaded, none during a second of load")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.throttle", fix="look after the fan, the air and the power cable of the card in {node}")
def test_nothing_slows_the_card_down(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    gpu = the_gpu(card, nvidia)
    work = working(gpu)
    bits = answered(work | {"name": gpu["name"]}, "reasons", "what slows it down")
    found = [word for bit, word in SLOWDOWNS.items() if bits & bit]
    assert not found, (
        f"{guest.name}: {gpu['name']} is slowed down by {', '.join(found)}, expected at most its power limit"
    )
    seen("nothing but its power limit" if bits & POWER_LIMIT else "nothing")


@pytest.mark.major
@pytest.mark.promise(
    "nvidia.gpu.temperature", "nvidia.thermal.critical_c", fix="look after the fan and the air of the card in {node}"
)
def test_card_is_cool_enough(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu, thermal = the_gpu(card, nvidia), guest.nvidia.thermal
    temperature = answered(gpu, "temperature_c", "its temperature")
    limit = thermal.critical_c if thermal else answered(gpu, "temperature_max_c", "its highest temperature")
    assert temperature < limit, f"{guest.name}: {gpu['name']} has {temperature} °C, expected less than {limit} °C"
    seen(f"{temperature} °C")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.thermal", "nvidia.thermal", fix=DEPLOY)
def test_temperature_is_watched_as_declared(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    the_gpu(card, nvidia)
    unit, wanted = nvidia["units"]["gpulab-gpu-thermal.service"], guest.nvidia.thermal is not None
    running = unit["active"] == "active"
    assert running == wanted, (
        f"{guest.name}: gpulab-gpu-thermal.service is {unit['active'] or 'absent'}, "
        f"expected {'active' if wanted else 'none, as no thermal policy is declared'}"
    )
    assert not wanted or unit["enabled"] == "enabled", (
        f"{guest.name}: gpulab-gpu-thermal.service is {unit['enabled']}, expected enabled at the next boot"
    )
    seen(unit["active"] or "no unit")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.settings", fix=DEPLOY)
def test_card_is_set_again_at_the_next_boot(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    the_gpu(card, nvidia)
    unit = nvidia["units"]["gpulab-gpu-settings.service"]
    assert unit["enabled"] == "enabled", (
        f"{guest.name}: gpulab-gpu-settings.service is {unit['enabled'] or 'absent'}, expected enabled: "
        "no setting of the card outlives a boot by itself"
    )
    assert unit["active"] != "failed", f"{guest.name}: gpulab-gpu-settings.service has failed at this boot"
    seen("its unit is enabled")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.power_limit", "nvidia.power_limit_w", fix=SETTINGS)
def test_power_limit_is_as_declared(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu = the_gpu(card, nvidia)
    wanted = guest.nvidia.power_limit_w or answered(gpu, "power_default_w", "its default power limit")
    limit = answered(gpu, "power_limit_w", "its power limit")
    enforced = gpu["power_enforced_w"] if gpu["power_enforced_w"] is not None else limit
    hint = "; did the thermal policy lower it (journalctl -u gpulab-gpu-thermal)?" if limit < wanted else ""
    for what, watts in (("limited to", limit), ("held to", enforced)):
        assert abs(watts - wanted) < 1, (
            f"{guest.name}: {gpu['name']} is {what} {watts:g} W, expected {wanted:g} W{hint}"
        )
    seen(f"{limit:g} W")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.clocks", "nvidia.clocks", fix=SETTINGS)
def test_clocks_are_locked_as_declared(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    gpu, clocks = the_gpu(card, nvidia), guest.nvidia.clocks
    if clocks is None:
        seen("none declared")
        return
    # A lock can't be asked for; it shows at work.
    work = working(gpu)
    clock = answered(work | {"name": gpu["name"]}, "clock_mhz", "its clock")
    least = clocks.min_mhz - CLOCK_STEP if not slowed(work) else 0
    assert least <= clock <= clocks.max_mhz + CLOCK_STEP, (
        f"{guest.name}: {gpu['name']} works at {clock} MHz, expected {clocks.min_mhz} to {clocks.max_mhz} MHz"
    )
    seen(f"{clock} MHz at work")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.ecc", "nvidia.ecc", fix="reboot {host}; then " + DEPLOY)
def test_ecc_is_as_declared(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu, wanted = the_gpu(card, nvidia), guest.nvidia.ecc
    if wanted is None:
        seen("not declared")
        return
    mode = bool(answered(gpu, "ecc", "its ECC mode"))
    waits = " (it changes with the next reboot)" if gpu["ecc_pending"] == wanted else ""
    assert mode == wanted, f"{guest.name}: ECC of {gpu['name']} is {on(mode)}{waits}, expected {on(wanted)}"
    seen(on(mode))


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.compute_mode", "nvidia.sharing", fix=SETTINGS)
def test_compute_mode_fits_the_way_of_sharing(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    gpu, sharing = the_gpu(card, nvidia), guest.nvidia.sharing
    mode, wanted = answered(gpu, "compute_mode", "its compute mode"), EXCLUSIVE_PROCESS
    if sharing == "time-slice":
        wanted = DEFAULT
    assert mode == wanted, (
        f"{guest.name}: compute mode of {gpu['name']} is {MODES.get(mode, mode)}, expected {MODES[wanted]} "
        f"for sharing by {sharing}"
    )
    seen(MODES[wanted])


@pytest.mark.minor
@pytest.mark.promise("nvidia.gpu.accounting", "nvidia.accounting", fix=SETTINGS)
def test_accounting_is_as_declared(guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]) -> None:
    gpu = the_gpu(card, nvidia)
    mode, wanted = bool(answered(gpu, "accounting", "accounting mode")), guest.nvidia.accounting
    assert mode == wanted, f"{guest.name}: accounting mode of {gpu['name']} is {on(mode)}, expected {on(wanted)}"
    seen(on(mode))


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.persistence", "nvidia.persistence", fix=DEPLOY)
def test_persistence_mode_is_as_declared(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    gpu = the_gpu(card, nvidia)
    mode = bool(answered(gpu, "persistence", "persistence mode"))
    assert mode == guest.nvidia.persistence, (
        f"{guest.name}: persistence mode is {on(mode)}, expected {on(guest.nvidia.persistence)}"
    )
    seen(on(mode))


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.memory_health", fix=REBOOT)
def test_memory_of_the_card_is_sound(
    guest: Guest, card: Card, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    gpu = the_gpu(card, nvidia)
    if gpu["ecc"]:
        errors = answered(gpu, "ecc_uncorrected", "ECC errors")
        assert errors == 0, f"{guest.name}: {errors} uncorrected ECC errors on {gpu['name']}, expected 0"
    uncorrectable, pending, failure = gpu["remapped"] or (0, 0, 0)
    assert not (pending or failure), (
        f"{guest.name}: {uncorrectable} remapped rows on {gpu['name']}, "
        f"{'a remapping failed' if failure else 'one waits for a reset'}; expected neither"
    )
    seen(f"{uncorrectable} remapped rows")


@pytest.mark.major
@pytest.mark.promise("nvidia.gpu.xid", fix=STOP)
def test_kernel_saw_no_error_of_the_card(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    if not nvidia["on_bus"] or not nvidia["nvml"]["gpus"]:
        not_run("the GPU is not visible")
    found = of_hardware(nvidia)
    assert not found, f"{guest.name}: the kernel log since boot has {found}, expected none of the hardware"
    seen("none" if not nvidia["xids"] else f"of applications alone: {', '.join(map(str, nvidia['xids']))}")


def of_hardware(nvidia: Observation) -> str:
    """The Xids of the card itself, `Xid 62, 79`; empty: none."""
    found = [str(number) for number in nvidia["xids"] if number not in OF_APPLICATIONS]
    return f"Xid {', '.join(found)}" if found else ""


def last_words(nvidia: Observation) -> str:
    """What the kernel said of a GPU that is gone, empty when it said nothing."""
    return f"`{nvidia['fallen']}`" if nvidia["fallen"] else of_hardware(nvidia)


def the_gpu(card: Card, nvidia: Observation) -> dict[str, Any]:
    """The declared card as NVML shows it; the check is not run without it."""
    gpu: dict[str, Any]
    for gpu in nvidia["nvml"]["gpus"]:
        if gpu["id"] == card.functions[0]:
            return gpu
    not_run("the GPU is not visible")


def working(gpu: dict[str, Any]) -> dict[str, Any]:
    """The card at work; the check is not run when nothing could be done with it."""
    work: dict[str, Any] = gpu["work"]
    if work["error"]:
        not_run(f"no client gets on with {gpu['name']}")
    return work


def at_rest(guest: Guest, work: dict[str, Any], found: str) -> None:
    """End the check where what was found is that of a card which others hold and do not use."""
    if work["by"] and not work["use"]:
        inconclusive(f"{guest.name}: {', '.join(work['by'])} holds the card and leaves it at rest: {found}")


def slowed(work: dict[str, Any]) -> bool:
    return bool((work["reasons"] or 0) & sum(SLOWDOWNS))


def on(mode: bool) -> str:
    return "on" if mode else "off"


def answered(gpu: dict[str, Any], key: str, what: str) -> Any:
    """A value of NVML; without one the check cannot tell."""
    if gpu[key] is None:
        inconclusive(f"{gpu['name']} or its driver does not answer for {what}")
    return gpu[key]

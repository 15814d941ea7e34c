# SPDX-License-Identifier: MIT
"""Passthrough on a real kernel: real drivers race for the card, vfio-pci has it all the same, and back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operations import files
from operations.hypervisor.facts import BIND_SCRIPT, MODPROBE
from rehearsal.kernel.topology import (
    CARD,
    CARD_AUDIO,
    GA104,
    SHARED_BRIDGE,
    SHARED_CARD,
    SHARED_NETWORK,
    TWIN,
    TWIN_AUDIO,
)

from .conftest import CONFIGURATION, PASSTHROUGH, Stage, initrd_configuration

pytestmark = pytest.mark.kernel
OURS = ["iommu=pt", "hugepagesz=2M hugepages=16"]


def probed(stage: Stage, driver: str, address: str) -> bool:
    """Does the kernel's log show this driver at work on this function?"""
    return re.search(rf"\b{driver} {re.escape(address)}", stage.kernel_log) is not None


@pytest.fixture(scope="session")
def initrd_before(fresh: Stage) -> str:
    return initrd_configuration(fresh.machine)


def test_both_drivers_race_for_the_card_when_nothing_of_ours_is_there(fresh: Stage, initrd_before: str) -> None:
    """They give up on it, since no real silicon answers; but they were first."""
    assert probed(fresh, "nouveau", CARD), fresh.kernel_log
    assert probed(fresh, "snd_hda_intel", CARD_AUDIO), fresh.kernel_log
    assert probed(fresh, "nouveau", TWIN)
    assert "vfio" not in initrd_before


def test_facts_tell_what_the_kernel_shows(fresh: Stage) -> None:
    found = fresh.facts()

    assert found["iommus"] and found["firmware_iommu"] == ["DMAR"]
    assert (found["cpu_vendor"], found["efi_directory"]) == ("GenuineIntel", False)
    assert [kernel["vfio"] for kernel in found["kernels"]] == [True]
    assert found["grub_cmdline"].split()[1:] == found["cmdline"].split()[1:]
    card = fresh.function(CARD)
    assert (card["id"], card["pci_class"], card["bars"]) == ("10de:24b0", "0300", [16 << 20])
    assert fresh.function(CARD_AUDIO)["iommu_group"] == card["iommu_group"]
    assert fresh.function(TWIN)["iommu_group"] != card["iommu_group"]
    assert fresh.function(SHARED_NETWORK)["iommu_group"] == fresh.function(SHARED_CARD)["iommu_group"]
    assert fresh.function(SHARED_BRIDGE)["bridge"]


def test_card_that_shares_its_group_is_refused_before_anything_changes(
    fresh: Stage, inventory_of: Callable[..., Path]
) -> None:
    devices = [{"name": "a4000", "address": SHARED_CARD.rpartition(".")[0]}]
    done = fresh.pyinfra("deploy.py", "-y", lab=inventory_of(fresh.machine, passthrough={"devices": devices}))

    assert done.status == 1
    assert f"also holds {SHARED_NETWORK} 8086:100e (Ethernet network controller" in done.output
    assert stage_manifest(fresh) == fresh.manifest


def test_plan_touches_nothing(fresh: Stage) -> None:
    done = fresh.pyinfra("deploy.py", "--dry")

    assert done.status == 0, done.output
    assert "reboot: yes (iommu=pt is not on the running command line" in done.output
    assert stage_manifest(fresh) == fresh.manifest


def test_reboot_that_is_not_allowed_is_waited_for_run_after_run(fresh: Stage, waiting: Stage) -> None:
    for done in waiting.outcomes.values():
        assert done.status == 1
        assert "pve1 needs a reboot: iommu=pt is not on the running command line" in done.output
        assert "allow_reboot is false" in done.output
    assert waiting.boot_id == fresh.boot_id
    assert waiting.manifest != fresh.manifest
    # The second run made nothing anew.
    assert "update-initramfs" not in " ".join(waiting.changed())


def test_deploy_reboots_once_and_ends_well(waiting: Stage, deployed: Stage) -> None:
    assert deployed.outcomes["deploy"].status == 0, deployed.outcomes["deploy"].output
    assert deployed.boot_id != waiting.boot_id
    # Files, initramfs and GRUB were the waiting run's; what follows the reboot is this one's.
    assert deployed.outcomes["changed"].output.splitlines()[0] == (
        "Reboot the node where its boot configuration needs it"
    )


def test_new_boot_has_our_words_and_the_kernel_took_them(deployed: Stage) -> None:
    found = deployed.facts()

    assert all(phrase in found["cmdline"] for phrase in OURS)
    assert found["hugepages"]["2048"] >= 16
    assert found["parameters"]["vfio_pci.disable_idle_d3"] == "Y"
    others = deployed.machine.run("cat /sys/bus/pci/devices/0000:00:02.0/iommu_group/type").stdout
    assert others.strip() == "identity"


def test_card_and_its_audio_are_vfios_although_both_drivers_were_free_to_race(deployed: Stage) -> None:
    for address in (CARD, CARD_AUDIO):
        function = deployed.function(address)
        assert (function["driver"], function["driver_override"]) == ("vfio-pci", "vfio-pci")
    assert f"gpulab: {CARD} is given to vfio-pci" in deployed.kernel_log
    assert not probed(deployed, "nouveau", CARD), deployed.kernel_log
    assert not probed(deployed, "snd_hda_intel", CARD_AUDIO)
    # Nobody kept them from loading.
    assert {"nouveau", "snd_hda_intel"} <= set(deployed.facts()["modules_loaded"])


def test_twin_of_the_same_id_is_left_to_the_host(deployed: Stage) -> None:
    assert probed(deployed, "nouveau", TWIN)
    assert probed(deployed, "snd_hda_intel", TWIN_AUDIO)
    for address in (TWIN, TWIN_AUDIO):
        function = deployed.function(address)
        assert function["driver"] != "vfio-pci" and function["driver_override"] is None


def test_script_leaves_a_shared_group_alone_on_a_real_kernel(deployed: Stage) -> None:
    """What an inactive IOMMU hides from the preflight is looked at before anything is bound."""
    entry: dict[str, Any] = {
        "name": "shared",
        "address": SHARED_CARD.rpartition(".")[0],
        "allow_shared_group": False,
        "functions": [{"address": SHARED_CARD, "id": "10de:24b0"}],
    }
    script = files.render("hypervisor/initramfs-tools/scripts/init-top/gpulab-vfio.j2", devices=[entry])

    deployed.machine.run("sh", input=script.encode())

    log = deployed.machine.run("dmesg").stdout
    assert f"is left to the host: its IOMMU group also holds {SHARED_NETWORK} (class 0x020000)" in log
    assert deployed.function(SHARED_CARD)["driver_override"] is None


def test_second_deploy_changes_nothing(deployed: Stage) -> None:
    done = deployed.pyinfra("deploy.py", "-y")

    assert done.status == 0, done.output
    assert deployed.changed() == []
    assert deployed.machine.boot_id() == deployed.boot_id


def test_verify_passes_every_check_of_the_node(deployed: Stage) -> None:
    done, verdicts = deployed.verify()

    assert done.status == 0, done.output
    assert set(verdicts.values()) == {"pass"}
    assert "hypervisor.vfio.bound" in verdicts and "hypervisor.next_boot.initramfs" in verdicts


def test_driver_that_takes_the_card_is_seen_by_verify_and_healed_by_a_reboot_alone(deployed: Stage) -> None:
    """Unbound by hand; bound again by hand, since a boot costs a minute here."""
    unbind = f"echo {CARD} > /sys/bus/pci/drivers/vfio-pci/unbind"
    deployed.machine.run(unbind)
    try:
        done, verdicts = deployed.verify()
        again = deployed.pyinfra("deploy.py", "-y")
    finally:
        deployed.machine.run(f"echo {CARD} > /sys/bus/pci/drivers_probe")

    assert done.status == 1
    assert {check for check, verdict in verdicts.items() if verdict == "fail"} == {"hypervisor.vfio.bound"}
    assert again.status == 1
    assert f"pve1: {CARD} is bound to no driver" in again.output


def test_amd_machine_binds_the_same(amd: Stage) -> None:
    found = amd.facts()
    assert (found["cpu_vendor"], found["firmware_iommu"]) == ("AuthenticAMD", ["IVRS"])
    assert "AMD-Vi" in amd.kernel_log
    assert amd.function(CARD)["driver"] == amd.function(CARD_AUDIO)["driver"] == "vfio-pci"
    assert amd.function(TWIN)["driver"] != "vfio-pci"


def test_program_opens_the_group_and_reads_the_cards_memory(amd: Stage) -> None:
    """Not on the Intel machine: there QEMU's emulation can lose the machine's interrupts when vfio is used."""
    found = amd.machine.vfio_probe(CARD)

    assert found["viable"]
    assert found["device_id"] == "10de:24b0"
    assert found["bar0_size"] == 16 << 20
    # The first register of a GA104, as the stand-in for the card has it.
    assert int(str(found["word0"]), 0) == GA104


def test_amd_machine_needs_no_other_words(amd: Stage) -> None:
    done = amd.pyinfra("deploy.py", "-y")

    assert done.status == 0, done.output
    assert amd.changed() == []


def test_rollback_restores_every_file_byte_for_byte(fresh: Stage, rolled_back: Stage) -> None:
    done = rolled_back.outcomes["rollback"]
    assert done.status == 0, done.output

    before, after = (
        dict(reversed(line.split(None, 1)) for line in text.splitlines())
        for text in (fresh.manifest, rolled_back.manifest)
    )
    # What was added by hand to a file of ours is not ours to take away.
    by_hand = after.pop(MODPROBE)
    assert after == before
    assert by_hand and rolled_back.machine.run(f"cat {MODPROBE}").stdout == "options snd_hda_intel power_save=1\n"


def test_rollback_shows_what_was_changed_by_hand(rolled_back: Stage) -> None:
    output = rolled_back.outcomes["rollback"].output

    assert f"{MODPROBE} was changed by hand since gpulab wrote it" in output
    assert "-options vfio_pci disable_idle_d3=1" in output
    assert "-options snd_hda_intel" not in output


def test_rollback_gives_the_card_back(deployed: Stage, rolled_back: Stage) -> None:
    assert rolled_back.boot_id != deployed.boot_id
    assert not any(phrase in rolled_back.facts()["cmdline"] for phrase in OURS)
    assert probed(rolled_back, "nouveau", CARD)
    assert probed(rolled_back, "snd_hda_intel", CARD_AUDIO)
    assert rolled_back.function(CARD)["driver_override"] is None
    assert rolled_back.function(CARD)["driver"] != "vfio-pci"


def test_initrd_after_the_rollback_holds_the_same_configuration(initrd_before: str, rolled_back: Stage) -> None:
    now = initrd_configuration(rolled_back.machine)

    by_hand = [line for line in now.splitlines() if MODPROBE[1:] in line]
    assert [line for line in now.splitlines() if line not in by_hand] == initrd_before.splitlines()
    assert not any(BIND_SCRIPT.rpartition("/")[2] in line for line in now.splitlines() if line not in by_hand)


def test_second_rollback_changes_nothing(rolled_back: Stage) -> None:
    done = rolled_back.pyinfra("rollback.py", "-y")

    assert done.status == 0, done.output
    assert rolled_back.changed() == []


def test_declared_options_were_not_the_defaults() -> None:
    """Else the scenario would show less than it says."""
    assert PASSTHROUGH["disable_idle_d3"] and PASSTHROUGH["hugepages"]


def stage_manifest(stage: Stage) -> str:
    return stage.machine.run(CONFIGURATION).stdout

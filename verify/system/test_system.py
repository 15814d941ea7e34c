# SPDX-License-Identifier: MIT
"""Is the guest itself as declared: address, clock, data disk, packages?"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from inventory import Guest
from verify.observations import Observation
from verify.verdicts import Broken, inconclusive, not_run

pytestmark = pytest.mark.on("guests")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: Seconds by which the guest's clock may differ from the control machine's.
CLOCK_S = 1.0
GIB = 2**30


@pytest.mark.critical
@pytest.mark.promise("system.reachable", "ssh_hostname", fix=DEPLOY)
def test_guest_answers_ssh_with_its_pinned_key(reach: Observation, seen: Callable[[str], None]) -> None:
    if reach["error"]:
        raise Broken(reach["error"], reach["fix"])
    seen("it answers")


@pytest.mark.critical
@pytest.mark.promise("system.address", "address", fix=DEPLOY)
def test_guest_has_its_address(guest: Guest, system: Observation, seen: Callable[[str], None]) -> None:
    wanted, found = str(guest.address), system["addresses"]
    assert wanted in found, f"{guest.name}: addresses {', '.join(found) or '(none)'}, expected {wanted}"
    seen(wanted)


@pytest.mark.major
@pytest.mark.promise("system.time", fix="systemctl restart systemd-timesyncd on {host}, and the time of {node}")
def test_clock_agrees_with_ours(guest: Guest, system: Observation, seen: Callable[[str], None]) -> None:
    # The guest's first reading was taken after ours, its last before ours: the offset lies between these two.
    least, most = system["ended"] - system["received"], system["began"] - system["sent"]
    found = f"{guest.name}: its clock is between {least:+.2f} and {most:+.2f} s off ours"
    if least > CLOCK_S or most < -CLOCK_S:
        pytest.fail(f"{found}, expected at most {CLOCK_S:g} s; is NTP blocked?", pytrace=False)
    if least < -CLOCK_S or most > CLOCK_S:
        inconclusive(f"{found}: the connection is too slow to tell")
    seen(f"offset {least:+.2f} to {most:+.2f} s")


@pytest.mark.critical
@pytest.mark.promise("system.data_disk", "data_disk.mount", fix=DEPLOY)
def test_data_disk_is_mounted_from_a_disk_of_its_own(
    guest: Guest, system: Observation, seen: Callable[[str], None]
) -> None:
    mount, data = guest.data_disk.mount, system["data"]
    assert data["source"] is not None, f"{guest.name}: nothing is mounted at {mount}, expected the data disk"
    assert data["separate"], (
        f"{guest.name}: {mount} is on {data['source']}, the system's own disk; expected a disk that outlives a rebuild"
    )
    seen(f"{data['source']} ({data['filesystem']}) at {mount}")


@pytest.mark.critical
@pytest.mark.promise("system.data_disk.beneath", "data_disk.mount", fix=DEPLOY)
def test_nothing_can_be_written_in_place_of_the_data_disk(
    guest: Guest, system: Observation, seen: Callable[[str], None]
) -> None:
    mount, beneath = guest.data_disk.mount, system["data"]["beneath"]
    assert beneath is not None, f"{guest.name}: {mount}: no such folder on the system disk, expected a mount point"
    assert not beneath["entries"], (
        f"{guest.name}: {mount} on the system disk holds {', '.join(beneath['entries'])}, expected nothing: "
        "services would take it for the data disk whenever that is away"
    )
    if beneath["immutable"] is None:
        not_run(f"the file system of {mount} knows no immutable folders")
    assert beneath["immutable"], (
        f"{guest.name}: {mount} on the system disk can be written to while the data disk is away, expected immutable"
    )
    seen("empty and immutable")


@pytest.mark.major
@pytest.mark.promise("system.data_disk.size", "data_disk.size_gib", fix=DEPLOY)
def test_data_disk_has_its_size(guest: Guest, system: Observation, seen: Callable[[str], None]) -> None:
    size = mounted(guest, system)["size_bytes"]
    wanted = guest.data_disk.size_gib
    assert size >= wanted * GIB, f"{guest.name}: the data disk has {size / GIB:.1f} GiB, expected {wanted} GiB"
    seen(f"{size / GIB:.1f} GiB")


@pytest.mark.major
@pytest.mark.promise("system.data_disk.fstab", "data_disk.mount", fix=DEPLOY)
def test_data_disk_is_mounted_again_at_the_next_boot(
    guest: Guest, system: Observation, seen: Callable[[str], None]
) -> None:
    field, mount = system["data"]["fstab"], guest.data_disk.mount
    assert field is not None, f"{guest.name}: /etc/fstab mounts nothing at {mount}: the next boot will not"
    assert field.startswith("UUID="), (
        f"{guest.name}: /etc/fstab mounts {field} at {mount}, expected UUID=…: device names change with the hardware"
    )
    data = system["data"]
    if data["source"] is not None:
        assert field.removeprefix("UUID=").strip('"') == data["uuid"], (
            f"{guest.name}: /etc/fstab mounts {field} at {mount}, expected UUID={data['uuid']}, which is there now"
        )
    seen(field)


@pytest.mark.minor
@pytest.mark.promise("system.packages", "distribution", fix=DEPLOY)
def test_base_packages_are_installed(guest: Guest, system: Observation, seen: Callable[[str], None]) -> None:
    missing = [name for name in guest.packages.base if name not in system["packages"]]
    assert not missing, f"{guest.name}: not installed: {', '.join(missing)}"
    seen(f"{len(guest.packages.base)} packages")


@pytest.mark.major
@pytest.mark.promise("system.security_upgrades", "security_upgrades", fix=DEPLOY)
def test_security_upgrades_are_as_declared(guest: Guest, system: Observation, seen: Callable[[str], None]) -> None:
    upgrades, there = system["upgrades"], "unattended-upgrades" in system["packages"]
    if not guest.security_upgrades:
        assert not (there and upgrades["runs"]), f"{guest.name}: unattended-upgrades runs, expected none"
        return
    assert there, f"{guest.name}: unattended-upgrades is not installed, expected security upgrades by themselves"
    assert upgrades["runs"], f"{guest.name}: APT::Periodic::Unattended-Upgrade is 0, expected 1"
    assert not upgrades["reboots"], (
        f"{guest.name}: Unattended-Upgrade::Automatic-Reboot is on, expected off: "
        "a new kernel waits for the deploy that has checked its modules"
    )
    # One that is masked was masked by somebody, and says so here.
    assert upgrades["timer"] in ("active", "masked"), (
        f"{guest.name}: apt-daily-upgrade.timer is {upgrades['timer'] or 'absent'}, expected active"
    )
    seen(f"apt-daily-upgrade.timer is {upgrades['timer']}")


def mounted(guest: Guest, system: Observation) -> Observation:
    """What is mounted as the data disk; the check is not run when nothing is."""
    if system["data"]["source"] is None:
        not_run(f"nothing is mounted at {guest.data_disk.mount}")
    return Observation(system["data"])

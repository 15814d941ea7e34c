# SPDX-License-Identifier: MIT
"""Does the guest run the driver that is declared, and will it stay on it?"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from inventory import Guest
from inventory.packages import TOOLKIT
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("gpus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: apt's priority of a package that nobody pinned.
UNPINNED = 500


@pytest.mark.critical
@pytest.mark.promise("nvidia.driver.loaded", "nvidia.branch", fix=DEPLOY)
def test_driver_is_loaded(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    loaded = nvidia["loaded"]
    if loaded is None and not nvidia["on_bus"]:
        not_run("there is no GPU in the guest")
    assert loaded is not None, f"{guest.name}: the kernel has no nvidia module loaded, expected R{guest.nvidia.branch}"
    seen(f"{loaded} is loaded")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.versions", "nvidia.branch", fix=DEPLOY)
def test_all_parts_of_the_driver_are_of_one_version(
    guest: Guest, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    package = userspace(guest, nvidia)
    versions = {
        "module on disk": nvidia["on_disk"],
        "package": package,
        "library": nvidia["library"],
        "GSP firmware": package if package in nvidia["firmware"] else ", ".join(nvidia["firmware"]) or None,
    }
    if nvidia["loaded"] is not None:
        versions["loaded module"] = nvidia["loaded"]
    told = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    assert len(set(versions.values())) == 1 and package is not None, (
        f"{guest.name}: {told}; expected one version: {cause(versions)}"
    )
    seen(told)


def cause(versions: dict[str, str | None]) -> str:
    """What it usually is, by the part that differs from the package."""
    wrong = [name for name, version in versions.items() if version != versions["package"]]
    if versions["package"] is None:
        return "the driver is not installed"
    if "module on disk" in wrong:
        return "DKMS did not build the module for the running kernel"
    if wrong == ["loaded module"]:
        return "the driver was upgraded under the loaded module"
    return f"{' and '.join(wrong)} came from elsewhere than the package, or went"


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.nouveau", "gpu", fix=DEPLOY)
def test_nouveau_leaves_the_card_alone(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    assert not nvidia["nouveau"]["loaded"], f"{guest.name}: nouveau is loaded, expected the card for NVIDIA's driver"
    assert nvidia["nouveau"]["blacklisted"], (
        f"{guest.name}: no file of modprobe.d has `blacklist nouveau`: the next boot may load it first"
    )
    seen("not loaded, and blacklisted")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.next_kernel", "nvidia.branch", fix=DEPLOY)
def test_kernel_that_boots_next_has_the_module(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    kernel, module = nvidia["next_kernel"]["kernel"], nvidia["next_kernel"]["module"]
    package = userspace(guest, nvidia)
    if package is None:
        not_run(f"{guest.packages.driver[0]} is not installed")
    assert module == package, (
        f"{guest.name}: kernel {kernel} boots next and has module {module or 'none'}, expected {package}: "
        "the guest would come up without its GPU"
    )
    seen(f"kernel {kernel} has {module}")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.held", "nvidia.branch", fix=DEPLOY)
def test_packages_of_the_driver_are_held(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    family = driver_family(guest, nvidia)
    loose = [name for name in family if name not in nvidia["held"]]
    assert not loose, (
        f"{guest.name}: not held: {', '.join(loose)}; an `apt upgrade` would replace the driver under its loaded module"
    )
    seen(f"{len(family)} packages")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.unattended", "security_upgrades", fix=DEPLOY)
def test_unattended_upgrades_leave_the_driver_alone(
    guest: Guest, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    if "unattended-upgrades" not in nvidia["installed"]:
        seen("unattended-upgrades is not installed")
        return
    patterns = nvidia["apt"]["blacklist"]
    names = sorted({*driver_family(guest, nvidia), *(name for name in TOOLKIT if name in nvidia["installed"])})
    # unattended-upgrades compares from a name's beginning, as this does.
    free = [name for name in names if not any(re.match(pattern, name) for pattern in patterns)]
    assert not free, (
        f"{guest.name}: unattended-upgrades may take {', '.join(free[:4])}; "
        "expected them in Unattended-Upgrade::Package-Blacklist"
    )
    seen(f"{len(names)} packages are left alone")


@pytest.mark.major
@pytest.mark.promise("nvidia.cuda", "nvidia.cuda", fix=DEPLOY)
def test_declared_cuda_toolkits_compile(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    for version in guest.nvidia.cuda:
        found = nvidia["cuda"][version]
        assert found == version, (
            f"{guest.name}: /usr/local/cuda-{version}/bin/nvcc says {found or 'nothing'}, expected release {version}"
        )
    seen(", ".join(guest.nvidia.cuda) or "none declared")


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.branch", "nvidia.branch", "nvidia.version", fix=DEPLOY)
def test_installed_driver_is_of_the_declared_branch(
    guest: Guest, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    installed, wanted = userspace(guest, nvidia), guest.nvidia.version
    assert installed is not None, f"{guest.name}: {guest.packages.driver[0]} is not installed"
    assert installed.split(".")[0] == guest.nvidia.branch, (
        f"{guest.name}: driver {installed}, expected branch {guest.nvidia.branch}"
    )
    assert wanted is None or installed == wanted, f"{guest.name}: driver {installed}, expected {wanted}"
    seen(installed)


@pytest.mark.major
@pytest.mark.promise("nvidia.driver.pin", "nvidia.branch", "nvidia.version", fix=DEPLOY)
def test_apt_stays_on_the_branch(guest: Guest, nvidia: Observation, seen: Callable[[str], None]) -> None:
    branch = guest.nvidia.branch
    for name in guest.packages.driver:
        policy = nvidia["policy"][name]
        candidate = policy["candidate"]
        assert candidate is not None, f"{guest.name}: apt knows no {name}; is the repository gone?"
        version = upstream(candidate) or ""
        assert version.split(".")[0] == branch, (
            f"{guest.name}: apt's next {name} would be {candidate}, expected branch {branch}"
        )
        assert guest.nvidia.version is None or version == guest.nvidia.version, (
            f"{guest.name}: apt's next {name} would be {candidate}, expected {guest.nvidia.version}"
        )
        priority = policy["priorities"].get(candidate, 0)
        assert priority > UNPINNED, (
            f"{guest.name}: {name} {candidate} has apt priority {priority}, expected a pin above {UNPINNED}: "
            "a newer branch in the repository would replace it"
        )
        seen(f"{candidate} at priority {priority}")


@pytest.mark.major
@pytest.mark.promise("nvidia.toolkit.version", "nvidia.toolkit_version", fix=DEPLOY)
def test_container_toolkit_is_of_the_declared_version(
    guest: Guest, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    wanted = guest.nvidia.toolkit_version
    wrong = [
        f"{name} {nvidia['policy'][name]['installed'] or 'absent'}"
        for name in TOOLKIT
        if nvidia["policy"][name]["installed"] != wanted
    ]
    assert not wrong, f"{guest.name}: {', '.join(wrong)}; expected {wanted}"
    seen(wanted)


@pytest.mark.minor
@pytest.mark.promise("nvidia.repository.signed", "nvidia.repository", "nvidia.toolkit_repository", fix=DEPLOY)
def test_repositories_are_checked_against_their_own_keys(
    guest: Guest, nvidia: Observation, seen: Callable[[str], None]
) -> None:
    for url, sources in nvidia["sources"].items():
        assert sources, f"{guest.name}: apt has no source below {url}"
        for source in sources:
            assert source["signed_by"] and not source["trusted"], (
                f"{guest.name}: /etc/apt/…/{source['file']} trusts {url} "
                f"{'unseen' if source['trusted'] else 'by any key of apt'}, expected signed-by"
            )
    seen(f"{len(nvidia['sources'])} repositories")


def upstream(version: str | None) -> str | None:
    """`580.95.05` of the package version `1:580.95.05-1`."""
    found = re.search(r"(?:^|:)([0-9]+(?:\.[0-9]+)+)", version or "")
    return found[1] if found else None


def driver_family(guest: Guest, nvidia: Observation) -> list[str]:
    """The driver's packages and all others of its version, whatever they are called."""
    version = userspace(guest, nvidia)
    if version is None:
        not_run(f"{guest.packages.driver[0]} is not installed")
    found = {name for name, each in nvidia["installed"].items() if upstream(each) == version}
    return sorted(found | {name for name in guest.packages.driver if nvidia["policy"][name]["installed"]})


def userspace(guest: Guest, nvidia: Observation) -> str | None:
    """The driver version of the installed user space package."""
    return upstream(nvidia["policy"][guest.packages.driver[0]]["installed"])

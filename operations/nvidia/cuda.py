# SPDX-License-Identifier: MIT
"""CUDA toolkits on the guest itself: versioned, side by side, and never with a driver in their train."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from inventory import GpulabError
from operations import apt, step
from operations.nvidia.facts import CudaFacts

#: `Inst libcuda1 [580.95.05-1] (590.44.01-1 NVIDIA:… [amd64])`, `Remv libcuda1 [580.95.05-1]`.
_STEP = re.compile(r"^(?P<what>Inst|Remv) (?P<name>\S+)(?: \[(?P<old>[^\]]+)\])?(?: \((?P<new>\S+))?", re.MULTILINE)


def drivers_moved(simulation: str, driver: str | None) -> list[str]:
    """What apt would do to the driver: packages of another driver version than the guest's, or removed ones.

    + simulation: what `apt-get --simulate install` printed
    + driver: the guest's driver version
    """
    moved = []
    for found in _STEP.finditer(simulation):
        new, old = found["new"] or "", found["old"] or ""
        # Only a driver's packages have versions such as 580.95.05; a toolkit's are 13.0.2 and 1.20.0.
        if not any(re.match(r"\d{3}\.\d", apt.upstream(version)) for version in (new, old) if version):
            continue
        if not re.search(r"nvidia|cuda|^libnv", found["name"]):
            continue
        if found["what"] == "Remv" or apt.upstream(new) != driver:
            moved.append(f"{found['name']}: {old or 'absent'} -> {new if found['what'] == 'Inst' else 'removed'}")
    return moved


def others(found: Mapping[str, Any], packages: Sequence[str]) -> str:
    """A remark on the toolkits that nobody declared."""
    undeclared = [name for name in found.get("toolkits", {}) if name not in packages]
    return f"; left alone, not declared: {', '.join(undeclared)}" if undeclared else ""


@step.step
def cuda(packages: Sequence[str]) -> step.Commands:
    """
    Ensure that the declared CUDA toolkits are installed, side by side.

    Nothing is installed when apt would change the driver for it. Toolkits that are not declared stay.

    + packages: `cuda-toolkit-12-9` and so on; never `cuda`, which brings a driver
    """
    found = step.read(CudaFacts, package_names=list(packages))
    absent = apt.missing(found.get("packages", {}), packages)
    if not absent:
        step.noop(
            (", ".join(packages) + " installed" if packages else "no CUDA toolkit declared") + others(found, packages)
        )
        return
    remark = others(found, packages).removeprefix("; ")
    lines = [f"{name}: absent -> its newest" for name in absent] + ([remark] if remark else [])
    step.changes("install CUDA toolkits", tuple(lines))
    yield apt.update()
    yield step.call(check_driver_stays, list(packages), absent)
    yield apt.install(absent)


def check_driver_stays(packages: Sequence[str], absent: Sequence[str]) -> None:
    """
    Raises:
        GpulabError: apt would change the driver, or can't install the toolkits at all.
    """
    found = step.read(CudaFacts, package_names=list(packages), simulate=list(absent))
    simulation = found["simulation"]
    if simulation["status"] != 0:
        raise apt.error_of(simulation["output"])
    moved = drivers_moved(simulation["output"], found["driver"])
    if moved:
        raise GpulabError(
            f"{', '.join(absent)} would change the driver; nothing was installed",
            "\n".join(
                [
                    f"Expected it to stay {found['driver'] or 'absent'}; apt would do:",
                    *(f"  {line}" for line in moved[:6]),
                ]
            ),
            "a toolkit `cuda-toolkit-X-Y` of NVIDIA's repository depends on no driver: look at where apt has this one "
            f"from (`apt-cache policy {absent[0]}` in the guest)",
        )

# SPDX-License-Identifier: MIT
"""The driver's five versions, which must agree, and the cause when they do not.

Loaded module, module on disk for the running kernel, user-space library, GSP firmware, and what is declared: all but
the last from one fact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from operations import apt


def of(found: Mapping[str, Any], branch: str, version: str | None) -> dict[str, str]:
    """Each version by its name; `absent` where there is none."""
    library = dict.fromkeys(value or "absent" for value in found["library"].values())
    return {
        "loaded module": found["loaded"] or "absent",
        "module on disk": found["on_disk"] or "absent",
        "user-space library": " and ".join(library) or "absent",
        "GSP firmware": ", ".join(found["firmware"]) or "absent",
        "declared": version or f"branch {branch}",
    }


def told(found: Mapping[str, Any], branch: str, version: str | None) -> str:
    """All five in one line."""
    return "Versions: " + ", ".join(f"{name} {value}" for name, value in of(found, branch, version).items())


def cause(found: Mapping[str, Any], packages: Sequence[str], branch: str, version: str | None) -> str:
    """Why the five do not agree, empty when they do or when no driver is installed yet.

    The first that fits: what is wrong with the packages explains what is wrong with their files.
    """
    installed = {name: found["packages"].get(name) for name in packages}
    there = {name: apt.upstream(value) for name, value in installed.items() if value}
    if found["broken"] or found["interrupted"]:
        which = ", ".join(f"{name} {state}" for name, state in list(found["broken"].items())[:4])
        return f"an earlier installation was interrupted: {which or 'dpkg has not finished'}"
    if not there:
        return ""
    if len(set(there.values())) > 1 or len(there) < len(packages):
        return "half-upgraded packages: " + ", ".join(
            f"{name} {value or 'absent'}" for name, value in installed.items()
        )
    package = next(iter(there.values()))
    if not apt.in_branch(installed[packages[0]], branch, version):
        return f"driver {package} is installed, declared is {version or f'branch {branch}'}"
    kernel = found["kernel"]
    if found["on_disk"] is None:
        return f"the module is not built for the running kernel {kernel}"
    if not found["dkms_built"]:
        return f"the module on disk for kernel {kernel} is {found['on_disk']}, the packages are {package}"
    if found["damaged"]:
        return f"missing on the disk: {', '.join(f'{what} of {package}' for what in sorted(found['damaged']))}"
    if found["loaded"] not in (None, package):
        return f"the packages were changed to {package} under the loaded module {found['loaded']}{_by(found)}"
    return ""


def _by(found: Mapping[str, Any]) -> str:
    """Who changed them, from apt's own history."""
    command = found["changed_by"]
    if not command:
        return ""
    return " by unattended-upgrades" if "unattended-upgrade" in command else f" by `{' '.join(command.split()[:4])}`"

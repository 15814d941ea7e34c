# SPDX-License-Identifier: MIT
"""apt on a guest: how versions are compared with what is pinned, and the one way in which packages are installed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pyinfra.api import QuoteString, StringCommand

#: Seconds to wait for another apt or dpkg (unattended-upgrades after a boot) to end.
LOCK_S = 300

# A run that was killed inside dpkg leaves its journal behind, and apt then refuses everything.
_INSTALL = """
set -e
export DEBIAN_FRONTEND=noninteractive
[ -z "$(ls -A /var/lib/dpkg/updates)" ] || dpkg --configure -a
apt-get -q -o DPkg::Lock::Timeout={lock} update
apt-get -q -y -o DPkg::Lock::Timeout={lock} -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold \
--no-install-recommends{flags} install "$@"
"""


def upstream(version: str) -> str:
    """A Debian version without its epoch and revision: `1:580.95.05-1` is `580.95.05`."""
    return version.rpartition(":")[2].rpartition("-")[0] or version.rpartition(":")[2]


def in_branch(version: str | None, branch: str, exact: str | None = None) -> bool:
    """Is a package version of driver branch `branch` and, when one is given, of exactly this upstream version?"""
    if version is None:
        return False
    found = upstream(version)
    return found == exact if exact else found.partition(".")[0] == branch


def missing(found: Mapping[str, str | None], wanted: Iterable[str]) -> list[str]:
    """Those packages that are not installed."""
    return [name for name in wanted if found.get(name) is None]


def update() -> StringCommand:
    """Refresh the package lists. An index that can't be had is an error: apt itself would only warn."""
    options = ("-q", "-o", f"DPkg::Lock::Timeout={LOCK_S}", "-o", "APT::Update::Error-Mode=any")
    return StringCommand("apt-get", *options, "update")


def install(packages: Iterable[str], repin: bool = False) -> StringCommand:
    """Refresh the package lists and install `packages` (`name` or `name=version`), without recommended ones.

    + repin: held packages may change, and versions may go down
    """
    flags = " --allow-downgrades --allow-change-held-packages" if repin else ""
    script = _INSTALL.format(lock=LOCK_S, flags=flags).strip()
    return StringCommand("sh", "-c", QuoteString(script), "install", *[QuoteString(word) for word in packages])

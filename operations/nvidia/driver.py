# SPDX-License-Identifier: MIT
"""The driver: its packages at the pinned version, its module built for the running kernel, loaded and answering."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.files import File, render
from operations.nvidia.facts import DriverFacts
from operations.reboot import reboot_and_wait

BLACKLIST = "/etc/modprobe.d/gpulab-nouveau.conf"

#: The persistence daemon keeps the module in use, so it steps aside while the module is replaced.
_RELOAD = """
set -e
daemon=nvidia-persistenced.service
if systemctl --quiet is-active "$daemon"; then systemctl stop "$daemon"; else daemon=; fi
for module in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do
    if [ -d "/sys/module/$module" ]; then rmmod "$module"; fi
done
modprobe -a nvidia nvidia_uvm
if [ -n "$daemon" ]; then systemctl start "$daemon"; fi
"""

# All packages of the driver's version, whatever they are called: unattended upgrades must not split them.
_HOLD = """
set -e
version=$(dpkg-query -W -f '${Version}' "$1")
dpkg-query -W -f '${Package} ${Version} ${db:Status-Status}\\n' '*nvidia*' '*cuda*' 'libnv*' 2>/dev/null |
    awk -v version="$version" '$2 == version && $3 == "installed" { print $1 }' | xargs apt-mark hold
"""


@dataclass(frozen=True)
class Actions:
    """What has to happen to the driver's packages."""

    install: tuple[str, ...] = ()
    build: bool = False
    hold: bool = False
    blacklist: bool = False

    def any(self) -> bool:
        return bool(self.install) or self.build or self.hold or self.blacklist


def read(packages: Sequence[str]) -> dict[str, Any]:
    """The driver's state; empty for a guest that does not exist yet."""
    found: dict[str, Any] = step.read(DriverFacts, package_names=list(packages), blacklist=BLACKLIST)
    return found


def require_gpu(found: Mapping[str, Any]) -> None:
    """
    Raises:
        GpulabError: the guest has no NVIDIA device.
    """
    if found and not found["gpus"]:
        raise GpulabError(
            "The guest has no NVIDIA GPU on its PCI bus",
            "Expected a display device of vendor 10de.",
            "look at hostpci0 in the VM's configuration, and whether the card is bound to vfio-pci on the node",
        )


def unfit(found: Mapping[str, Any], packages: Sequence[str], branch: str, version: str | None) -> list[str]:
    """The driver packages that are not installed at the declared version."""
    installed = found.get("packages", {})
    return [name for name in packages if not apt.in_branch(installed.get(name), branch, version)]


def header_packages(kernel: str, fallback: str) -> list[str]:
    """The headers of the running kernel, and the package that follows its flavour through upgrades.

    + kernel: `uname -r`, such as `6.12.48+deb13-cloud-amd64`
    + fallback: the following package for a kernel whose name says no flavour
    """
    flavour = re.fullmatch(r"[0-9.]+(?:~bpo\d+)?(?:\+deb\d+(?:[.u]\d+)*|-\d+)?-((?:\w+-)*amd64)", kernel)
    return [f"linux-headers-{kernel}", f"linux-headers-{flavour[1]}" if flavour else fallback]


def decide(
    found: Mapping[str, Any], packages: Sequence[str], headers: str, branch: str, version: str | None
) -> Actions:
    """What has to happen for the packages to be as declared.

    Raises:
        GpulabError: Secure Boot would refuse the module.
    """
    wrong = unfit(found, packages, branch, version)
    blacklist = found.get("blacklist") != render("nvidia/gpulab-nouveau.conf.j2")
    if not found:
        return Actions(tuple(packages), hold=True, blacklist=blacklist)
    if wrong and found["secure_boot"] and found["loaded"] is None:
        raise GpulabError(
            "Secure Boot is on in the guest, and modules built by DKMS carry no key that it knows",
            "Expected Secure Boot off.",
            "give the VM an EFI disk with pre-enrolled-keys=0, or enrol DKMS' key by hand (mokutil --import)",
        )
    build = bool(wrong) or not found["dkms_built"]
    install = list(packages) if wrong else []
    if build and not found["headers"] and found["headers_exist"]:
        install = [*header_packages(found["kernel"], headers), *install]
    unheld = not set(found["family"]) <= set(found["held"])
    return Actions(tuple(install), build and not wrong, bool(wrong) or unheld, blacklist)


@step.step
def driver(
    packages: Sequence[str],
    headers: str,
    branch: str,
    version: str | None = None,
) -> step.Commands:
    """
    Ensure that the driver is installed at the pinned version and built for the running kernel.

    The version is the one that the pin of `repository` chooses. An installed driver of the declared branch stays
    as it is; only a `version` moves it, up or down. All its packages are held. A kernel module that DKMS could not
    build is an error here, with the end of its log, not at the next boot.

    + packages: the driver's packages
    + headers: the package that follows kernel headers, for kernels whose name says no flavour
    + branch: driver branch, such as `580`
    + version: exact driver version; None: any of the branch
    """
    found = read(packages)
    require_gpu(found)
    actions = decide(found, packages, headers, branch, version)
    if not actions.any():
        step.noop(f"driver {apt.upstream(found['packages'][packages[0]])} is installed, held and built")
        return
    _record(found, actions, packages, version or f"the newest of {branch}")
    if actions.blacklist:
        # Before the packages: nouveau must not take the card at the boot that may follow.
        yield files.write({BLACKLIST: File(render("nvidia/gpulab-nouveau.conf.j2"))})
        script = "if command -v update-initramfs > /dev/null; then update-initramfs -u; fi"
        yield StringCommand("sh", "-c", QuoteString(script))
    if actions.install:
        held = sorted(set(found.get("family", ())) & set(found.get("held", ())))
        if held and set(packages) & set(actions.install):
            # --allow-change-held-packages frees only the packages it is given, not what depends on them.
            yield StringCommand("apt-mark", "unhold", *[QuoteString(name) for name in held])
        yield apt.install(actions.install, repin=True)
    if actions.build:
        yield StringCommand("sh", "-c", QuoteString('dkms autoinstall -k "$(uname -r)"'))
    if actions.hold:
        yield StringCommand("sh", "-c", QuoteString(_HOLD.strip()), "hold", QuoteString(packages[0]))
    if actions.install or actions.build:
        yield step.call(check_built, list(packages), branch, version)


def _record(found: Mapping[str, Any], actions: Actions, packages: Sequence[str], wanted: str) -> None:
    if actions.install:
        installed = found.get("packages", {})
        moving = [name for name in packages if name in actions.install]
        lines = [f"{name}: {installed.get(name) or 'absent'} -> {wanted}" for name in moving]
        lines += [f"{name}: absent -> its newest" for name in actions.install if name not in packages]
        if found and not found["headers"] and not found["headers_exist"]:
            lines.append(f"without headers: no package linux-headers-{found['kernel']} exists")
        step.changes("install the NVIDIA driver", tuple(lines))
    if actions.build:
        step.changes(f"build the NVIDIA module for kernel {found['kernel']}")
    if actions.hold:
        step.changes("hold the NVIDIA driver's packages")
    if actions.blacklist:
        step.changes(f"file {BLACKLIST}", ("+blacklist nouveau", "+options nouveau modeset=0"))


def check_built(packages: Sequence[str], branch: str, version: str | None) -> None:
    """
    Raises:
        GpulabError: the packages are at another version, or DKMS has no module for the running kernel.
    """
    found = read(packages)
    wrong = unfit(found, packages, branch, version)
    if wrong:
        seen = ", ".join(f"{name} {found['packages'].get(name) or 'absent'}" for name in wrong)
        raise GpulabError(
            f"apt installed another driver than {version or branch}",
            f"Seen: {seen}",
            "`apt-cache policy nvidia-driver-cuda` in the guest shows what the repository has",
        )
    if not found["dkms_built"]:
        status = "; ".join(found["dkms"]) or "nothing"
        raise GpulabError(
            f"DKMS has not built the NVIDIA module for the running kernel {found['kernel']}",
            "\n".join(part for part in (f"dkms status: {status}", found["make_log"]) if part),
            "a kernel that is newer than the driver needs a newer driver: see nvidia.version",
        )


@dataclass(frozen=True)
class Loading:
    """How the installed module gets into the kernel. `reboot`: why only a reboot can do it."""

    load: bool = False
    reload: bool = False
    reboot: str = ""

    def any(self) -> bool:
        return self.load or self.reload or bool(self.reboot)


def decide_loading(found: Mapping[str, Any], packages: Sequence[str], branch: str, version: str | None) -> Loading:
    """What has to happen for the kernel to run the installed (or about to be installed) driver.

    Raises:
        GpulabError: the right module is loaded and nvidia-smi still does not answer.
    """
    if not found:
        return Loading(load=True)
    changing = bool(unfit(found, packages, branch, version))
    # What driver() is about to install is on no disk yet: any loaded module is then the wrong one.
    fits = found["loaded"] is not None and not changing and found["loaded"] == found["on_disk"]
    if fits:
        if found["smi"]["status"] != 0:
            raise silent(found)
        return Loading()
    if found["loaded"] is None:
        if found["nouveau"]:
            return Loading(reboot="nouveau has the card")
        return Loading(load=True)
    if found["users"]:
        return Loading(reboot=f"driver {found['loaded']} is in use by {', '.join(found['users'][:3])}")
    return Loading(reload=True)


def silent(found: Mapping[str, Any]) -> GpulabError:
    """nvidia-smi's own words, with the versions that should be equal."""
    versions = f"loaded {found['loaded']}, on disk {found['on_disk']}"
    return GpulabError(
        "nvidia-smi does not answer",
        f"It says: {found['smi']['output'] or 'nothing'} (exit status {found['smi']['status']})\nModule: {versions}",
        "`dmesg | grep -i -e nvrm -e xid` in the guest says why; a card that fell off the bus needs the VM stopped "
        "and started",
    )


@step.step
def loaded(
    packages: Sequence[str],
    branch: str,
    allow_reboot: bool,
    reboot_timeout_s: int,
    version: str | None = None,
) -> step.Commands:
    """
    Ensure that the kernel runs the installed driver and that nvidia-smi answers.

    A module of another version is replaced in place when nothing uses the GPU; otherwise the guest is rebooted, if
    it may be. **Reboot**: only for a reason that the plan names.

    + packages: the driver's packages
    + branch: driver branch, such as `580`
    + allow_reboot: may the guest be rebooted?
    + reboot_timeout_s: seconds until SSH must answer again
    + version: exact driver version; None: any of the branch
    """
    found = read(packages)
    require_gpu(found)
    loading = decide_loading(found, packages, branch, version)
    if not loading.any():
        step.noop(f"the kernel runs driver {found['loaded']}, and nvidia-smi answers")
        return
    if loading.reboot:
        if not allow_reboot:
            raise GpulabError(
                f"{host.name} needs a reboot: {loading.reboot}; allow_reboot is false",
                resolution="reboot it when it suits its users and deploy again, or set `allow_reboot`",
            )
        step.reboots(loading.reboot)
        yield step.call(reboot_and_wait, host._get_module(), found["boot_id"], reboot_timeout_s)
    elif loading.reload:
        step.changes(f"replace the loaded NVIDIA module {found['loaded']}")
        yield StringCommand("sh", "-c", QuoteString(_RELOAD.strip()), "reload")
    else:
        step.changes("load the NVIDIA module")
    if not loading.reload:
        # After a reboot this makes sure of nvidia_uvm and of its device node.
        yield StringCommand("modprobe", "-a", "nvidia", "nvidia_uvm")
    yield step.call(check_loaded, list(packages), branch, version)


def check_loaded(packages: Sequence[str], branch: str, version: str | None) -> None:
    """
    Raises:
        GpulabError: the loaded module is not the installed one, or nvidia-smi does not answer.
    """
    found = read(packages)
    if decide_loading(found, packages, branch, version).any():
        raise GpulabError(
            f"The kernel still runs NVIDIA module {found['loaded'] or 'none'}, not {found['on_disk']}",
            f"In use by: {', '.join(found['users']) or 'no process'}",
            "`dmesg | grep -i nvrm` in the guest says why; a reboot of the guest loads the installed one",
        )

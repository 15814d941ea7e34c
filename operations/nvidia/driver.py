# SPDX-License-Identifier: MIT
"""The driver: its packages at the pinned version, its module built for the running kernel, loaded and answering."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.files import File, render
from operations.nvidia import versions
from operations.nvidia.facts import DriverFacts
from operations.nvidia.kernels import BUILD, require_bootable
from operations.nvidia.repository import PIN, driver_pin
from operations.reboot import reboot_and_wait
from operations.remote.common import CONTAINERS_LOCK
from operations.told import Told

BLACKLIST = "/etc/modprobe.d/gpulab-nouveau.conf"

#: MiB that must be free before anything is downloaded: the driver's packages, headers, the module's build, and a new
#: initramfs beside the old one.
NEEDED_MIB = {"/usr": 1500, "/var": 1500, "/boot": 100}

# The persistence daemon and MPS' server keep the module in use, so they step aside while it is replaced. MPS' clients
# count as users of the GPU, so it has none here. Nobody looks into containers meanwhile: each look runs nvidia-smi.
_RELOAD = f"""
set -e
mkdir -p {os.path.dirname(CONTAINERS_LOCK)}
exec 9>> {CONTAINERS_LOCK}
flock 9
stopped=
for unit in gpulab-mps.service nvidia-persistenced.service; do
    if systemctl --quiet is-active "$unit"; then systemctl stop "$unit"; stopped="$unit $stopped"; fi
done
for module in nvidia_uvm nvidia_drm nvidia_modeset nvidia; do
    if [ -d "/sys/module/$module" ]; then rmmod "$module"; fi
done
modprobe -a nvidia nvidia_uvm
for unit in $stopped; do systemctl start "$unit"; done
"""

# All packages of the driver's version, whatever they are called: unattended upgrades must not split them.
_HOLD = """
set -e
version=$(dpkg-query -W -f '${Version}' "$1")
form='${Package} ${Version} ${db:Status-Status}\\n'
set -- hold $(dpkg-query -W -f "$form" '*nvidia*' '*cuda*' 'libnv*' 2> /dev/null |
    awk -v version="$version" '$2 == version && $3 == "installed" { print $1 }')
""" + apt.MARK.lstrip()


@dataclass(frozen=True)
class Actions:
    """What has to happen to the driver's packages. `why`: what is wrong with those that are installed."""

    install: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    reinstall: tuple[str, ...] = ()
    build: bool = False
    hold: bool = False
    blacklist: bool = False
    why: str = ""

    def any(self) -> bool:
        return bool(self.install or self.reinstall) or self.build or self.hold or self.blacklist


def read(packages: Sequence[str], policy: bool = False) -> dict[str, Any]:
    """The driver's state; empty for a guest that does not exist yet."""
    found: dict[str, Any] = step.read(DriverFacts, package_names=list(packages), blacklist=BLACKLIST, policy=policy)
    return found


def require_gpu(found: Mapping[str, Any], vmid: int | None = None, node: str | None = None) -> None:
    """
    + vmid, node: the guest's VM, for the commands of the hints

    Raises:
        GpulabError: the guest has no NVIDIA device, or one that does not answer any more.
    """
    if not found:
        return
    vm, where = vmid or "VMID", f" on {node}" if node else " on the node"
    if not found["gpus"]:
        raise GpulabError(
            "The guest has no NVIDIA GPU on its PCI bus: its VM was started without one",
            "Expected a display device of vendor 10de.",
            f"`qm config {vm} | grep hostpci`{where}: without hostpci0 it was never given one; with it, the running VM "
            f"is older than that line: `qm stop {vm} && qm start {vm}` (a reboot inside adds no device)",
        )
    if reason := fallen(found):
        raise GpulabError(
            f"The GPU {found['gpus'][0]['address']} has fallen off the bus: {reason}",
            "\n".join(found["kernel_log"][-3:]),
            f"`qm stop {vm} && qm start {vm}`{where} resets the card, which a reboot inside the guest does not; if it "
            "comes back: power, heat, or the card's seat in its slot",
        )


def fallen(found: Mapping[str, Any]) -> str:
    """Why the card counts as gone, empty when it does not."""
    if any(not gpu["answers"] for gpu in found["gpus"]):
        return "its configuration space reads all ones"
    if found["smi"]["status"] == 0:
        return ""
    for line in reversed(found["kernel_log"]):
        if "fallen off the bus" in line or re.search(r"NVRM: Xid \([^)]*\): 79\b", line):
            return "the kernel log says so (Xid 79)"
    if "GPU is lost" in found["smi"]["output"]:
        return "nvidia-smi says that it is lost"
    return ""


def unfit(found: Mapping[str, Any], packages: Sequence[str], branch: str, version: str | None) -> list[str]:
    """The driver packages that are not installed at the declared version; all of them, where they are of several."""
    installed = found.get("packages", {})
    wrong = [name for name in packages if not apt.in_branch(installed.get(name), branch, version)]
    if wrong:
        return wrong
    return list(packages) if len({apt.upstream(installed[name]) for name in packages}) > 1 else []


def header_packages(kernel: str, fallback: str) -> list[str]:
    """The headers of the running kernel, and the package that follows its flavour through upgrades.

    + kernel: `uname -r`, such as `6.12.48+deb13-cloud-amd64`
    + fallback: the following package for a kernel whose name says no flavour
    """
    flavour = re.fullmatch(r"[0-9.]+(?:~bpo\d+)?(?:\+deb\d+(?:[.u]\d+)*|-\d+)?-((?:\w+-)*amd64)", kernel)
    return [f"linux-headers-{kernel}", f"linux-headers-{flavour[1]}" if flavour else fallback]


def leftovers(found: Mapping[str, Any], packages: Sequence[str], branch: str) -> list[str]:
    """Packages of another branch that the declared one does not know by that name.

    Ubuntu's names carry the branch up to 580, so nothing replaces them: `nvidia-utils-580` must go with its branch.
    """
    unnumbered = {name.replace(f"-{branch}", "") for name in packages} - set(packages)
    left = []
    for name, installed in found.get("related", {}).items():
        major = apt.upstream(installed).partition(".")[0]
        numbered = re.search(r"-(\d{3})(?=-|\.|$)", name)
        old = numbered is not None and numbered[1] == major != branch
        if (old or (name in unnumbered and major != branch)) and name not in packages:
            left.append(name)
    return left


def of_driver(found: Mapping[str, Any]) -> set[str]:
    """The installed packages that have a driver's version: `580.95.05`, unlike a toolkit's `1.20.0`."""
    return {name for name, version in found.get("related", {}).items() if re.match(r"\d{3}\.", apt.upstream(version))}


def unheld(found: Mapping[str, Any], packages: Sequence[str]) -> bool:
    """Is a package of the installed driver not held?"""
    version = found["packages"][packages[0]]
    return any(found["related"][name] == version for name in of_driver(found) - set(found["held"]))


def overridden(
    found: Mapping[str, Any], packages: Sequence[str], branch: str, version: str | None
) -> GpulabError | None:
    """The error for a pin of ours that another file overrides, so that apt would install another driver.

    Only once our own file says what is declared: before, apt's choice is what is about to be changed.
    """
    mine = [pin["pin"] for pin in found["preferences"] if pin["file"] == PIN]
    if f"version {driver_pin(branch, version)}" not in mine:
        return None
    choices = {name: found["candidates"].get(name) for name in packages}
    # No candidate at all is apt's to explain: the repository may not have been read yet.
    wrong = {name: choice for name, choice in choices.items() if choice and not apt.in_branch(choice, branch, version)}
    if not wrong:
        return None
    others = [
        f"  {pin['file']}: Package: {pin.get('package', '')}; Pin: {pin['pin']}; "
        f"Pin-Priority: {pin.get('pin-priority', '')}"
        for pin in found["preferences"]
        if pin["file"] != PIN and any(_is_about(pin.get("package", ""), name) for name in wrong)
    ]
    name, choice = next(iter(wrong.items()))
    return GpulabError(
        f"Something overrides the pin of the driver: apt would install {name} {choice}",
        "\n".join([f"Expected {version or f'branch {branch}'}.", *(others or ["No other pin names it."])]),
        "remove that file or its lines, and deploy again"
        if others
        else f"`apt-cache policy {name}` in the guest; the declared version may have left the repository",
    )


def _is_about(patterns: str, name: str) -> bool:
    """Does a `Package:` field concern a package? Regular expressions and source packages by what they name."""
    for pattern in patterns.split():
        word = pattern.partition(":")[0] if not pattern.startswith("src:") else pattern.split(":")[1]
        if fnmatch(name, word) or (pattern.startswith(("src:", "/")) and re.search("nvidia|cuda", word)):
            return True
    return False


def cramped(found: Mapping[str, Any]) -> GpulabError | None:
    """The error for a disk that would be full before the driver is installed."""
    short = {place: free for place, free in found["free_mib"].items() if free < NEEDED_MIB[place]}
    if not short:
        return None
    seen = ", ".join(f"{place} has {free} MiB free, needed are {NEEDED_MIB[place]}" for place, free in short.items())
    return GpulabError(
        "The guest's disk has too little space for the driver; nothing was downloaded",
        f"Seen: {seen}.",
        "`apt-get clean` and `apt-get autoremove --purge` in the guest (old kernels); `system_disk_gib` grows the disk",
    )


def refused_by_secure_boot(said: str = "") -> GpulabError:
    """Secure Boot, and the two ways out. `said`: modprobe's words, where it was tried."""
    return GpulabError(
        "Secure Boot is on in the guest, and its firmware does not know the key of the module that DKMS builds",
        "\n".join(
            [
                *([f"modprobe says: {said}"] if said else []),
                "There are two ways:",
                "  1. an EFI disk without Microsoft's keys (efidisk0 with pre-enrolled-keys=0): a rebuild of the guest",
                "  2. DKMS' key enrolled: `mokutil --import /var/lib/dkms/mok.pub` in the guest (Ubuntu: "
                "/var/lib/shim-signed/mok/MOK.der), a reboot, and `Enroll MOK` on the VM's console",
            ]
        ),
        "the first: the second needs somebody at the console during the boot, which nothing can do over SSH",
    )


def decide(
    found: Mapping[str, Any], packages: Sequence[str], headers: str, branch: str, version: str | None
) -> Actions:
    """What has to happen for the packages to be as declared.

    Raises:
        GpulabError: Secure Boot would refuse the module, the disk is too small, another pin overrides ours, or
            files that no package brought lie over the driver's.
    """
    blacklist = found.get("blacklist") != render("nvidia/gpulab-nouveau.conf.j2")
    if not found:
        return Actions(tuple(packages), hold=True, blacklist=blacklist)
    if found["foreign"]:
        raise GpulabError(
            f"A driver that no package brought lies over the installed one: {found['foreign'][0]}",
            versions.told(found, branch, version),
            "NVIDIA's own installer (.run) leaves such files: `nvidia-uninstall` in the guest, and deploy again",
        )
    if error := overridden(found, packages, branch, version):
        raise error
    halfway = bool(found["broken"]) or found["interrupted"]
    wrong = unfit(found, packages, branch, version)
    install = list(packages) if wrong or halfway else []
    if halfway:
        # apt moves no dependency of a package that is there in its new version already, configured or not.
        others = {name for name in found["broken"] if re.search(r"nvidia|cuda|^libnv", name)} | of_driver(found)
        install += sorted(others - set(packages) - set(leftovers(found, packages, branch)))
    build = not install and not found["dkms_built"]
    if install and found["secure_boot"] and not found["mok_enrolled"] and found["loaded"] is None:
        raise refused_by_secure_boot()
    # A new version brings all files anyway. A file that no package knows must come with one of the driver's.
    damaged = [] if install else found["damaged"].values()
    reinstall = sorted({name for owners in damaged for name in owners or packages})
    if (install or reinstall or build) and (error := cramped(found)):
        raise error
    if (build or install) and not found["headers"] and found["headers_exist"]:
        install = [*header_packages(found["kernel"], headers), *install]
    return Actions(
        install=tuple(install),
        remove=tuple(leftovers(found, packages, branch)),
        reinstall=tuple(reinstall),
        build=build,
        # apt forgets the hold of what it reinstalls.
        hold=bool(wrong or reinstall) or halfway or unheld(found, packages),
        blacklist=blacklist,
        why=versions.cause(found, packages, branch, version),
    )


@step.step
def driver(
    packages: Sequence[str],
    headers: str,
    branch: str,
    version: str | None = None,
    vmid: int | None = None,
    node: str | None = None,
) -> step.Commands:
    """
    Ensure that the driver is installed at the pinned version and built for the running kernel.

    The version is the one that the pin of `repository` chooses. An installed driver of the declared branch stays
    as it is; only a `version` moves it, up or down. All its packages are held; those of another branch that the
    declared one does not know go. A kernel module that DKMS could not build is an error here, told by the compiler's
    first error, not at the next boot.

    + packages: the driver's packages
    + headers: the package that follows kernel headers, for kernels whose name says no flavour
    + branch: driver branch, such as `580`
    + version: exact driver version; None: any of the branch
    + vmid: the guest's VM, for the commands of a hint
    + node: its node, for the same
    """
    found = read(packages, policy=True)
    require_gpu(found, vmid, node)
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
    explain = partial(_explain_install, list(packages))
    if actions.install:
        held = sorted((of_driver(found) | set(actions.remove)) & set(found.get("held", ())))
        if held and set(packages) & set(actions.install):
            # --allow-change-held-packages frees only the packages it is given, not what depends on them.
            yield apt.mark("unhold", held)
        words = [*actions.install, *(f"{name}-" for name in actions.remove)]
        yield apt.install(words, repin=True, explain=explain)
    if actions.reinstall:
        # The same version: the newest of the branch would not go with the others.
        words = [f"{name}={found['related'][name]}" for name in actions.reinstall]
        yield apt.install(words, repin=True, reinstall=True, explain=explain)
    if actions.build:
        source = next((re.split("[,:]", line)[0] for line in found["dkms"]), "")
        words = [found["kernel"], source]
        yield StringCommand("sh", "-c", QuoteString(BUILD.strip()), "build", *map(QuoteString, words))
    if actions.hold:
        yield Told("sh", "-c", QuoteString(_HOLD.strip()), "hold", QuoteString(packages[0]), explain=apt.error_of)
    if actions.install or actions.reinstall or actions.build:
        yield step.call(check_built, list(packages), branch, version)


def _record(found: Mapping[str, Any], actions: Actions, packages: Sequence[str], wanted: str) -> None:
    why = (actions.why,) if actions.why else ()
    if actions.install:
        lines: list[str] = []
        there = {**found.get("related", {}), **found.get("broken", {})}
        for name in actions.install:
            new = wanted if name in packages or name in there else "its newest"
            lines.append(f"{name}: {there.get(name) or 'absent'} -> {new}")
        lines += [f"{name}: {there[name]} -> removed" for name in actions.remove]
        if found and not found["headers"] and not found["headers_exist"]:
            lines.append(f"without headers: no package linux-headers-{found['kernel']} exists")
        step.changes("install the NVIDIA driver", (*why, *lines))
    if actions.reinstall:
        missing = ", ".join(sorted(found["damaged"]))
        step.changes(f"reinstall {', '.join(actions.reinstall)}", (f"missing on the disk: {missing}",))
    if actions.build:
        step.changes(f"build the NVIDIA module for kernel {found['kernel']}", why)
    if actions.hold:
        step.changes("hold the NVIDIA driver's packages")
    if actions.blacklist:
        step.changes(f"file {BLACKLIST}", ("+blacklist nouveau", "+options nouveau modeset=0"))


def _explain_install(packages: Sequence[str], output: str) -> GpulabError:
    """apt fails when the package of the module can't build it; then the build says why, not apt."""
    failure = apt.error_of(output)
    if failure.brief.startswith("dpkg could not configure"):
        found = read(packages)
        if not found["dkms_built"] and found["build_failure"]:
            return unbuilt(found)
    return failure


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
            f"`apt-cache policy {wrong[0]}` in the guest shows what the repository has",
        )
    if not found["dkms_built"]:
        raise unbuilt(found)
    if found["damaged"]:
        missing = ", ".join(sorted(found["damaged"]))
        raise GpulabError(
            f"Files of the driver are not on the guest's disk: {missing}",
            versions.told(found, branch, version),
            "no installed package brings them: `apt-cache policy` of the driver's packages in the guest",
        )


def unbuilt(found: Mapping[str, Any]) -> GpulabError:
    """A module that was not built: which file, which error, which kernel, and what still runs."""
    failure, kernel, loaded = found["build_failure"], found["kernel"], found["loaded"]
    lines = [f"  kernel  {kernel}, which runs"]
    hint = "a kernel that is newer than the driver needs a newer driver: see nvidia.version and nvidia.branch"
    if failure is not None:
        if failure["kernel"] != kernel:
            lines.append(f"  failed  for kernel {failure['kernel']}, before that one's turn came")
            hint = f"remove what DKMS can't build for: `apt-get remove linux-headers-{failure['kernel']}` in the guest"
        if failure["file"]:
            lines.append(f"  file    {failure['file']}, line {failure['line']}")
        more = f" (and {failure['more']} more)" if failure["more"] else ""
        lines += [f"  error   {failure['error']}{more}", f"  log     {failure['log']}"]
        if "No space left" in failure["error"]:
            hint = "`df -h` in the guest; `system_disk_gib` grows its system disk"
        elif failure["error"].endswith(("not found", "No such file or directory")) and not failure["file"]:
            hint = (
                "a tool of the build is missing: `apt-get install build-essential dkms` in the guest, and deploy again"
            )
    elif found["headers"]:
        lines.append(f"  dkms    {'; '.join(found['dkms']) or 'knows of no NVIDIA module'}")
    if not found["headers"]:
        lines.append(f"  headers linux-headers-{kernel} is not installed")
        if failure is None and not found["headers_exist"]:
            hint = (
                "apt knows no headers of this kernel any more: upgrade the guest's kernel, reboot it and deploy again"
            )
    runs = f"it still runs driver {loaded}" if loaded else "it runs without NVIDIA's driver"
    library = found["library"]["libnvidia-ml.so.1"]
    if loaded and library not in (None, loaded):
        runs += f", which programs started from now on can't use: user space is {library}"
        hint += f"; or declare the version that runs, {loaded}, again"
    return GpulabError(
        f"DKMS has not built the NVIDIA module for the running kernel {kernel}",
        "\n".join([*lines, f"The guest was not rebooted; {runs}."]),
        hint,
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
    if found["loaded"] is None:
        return (
            Loading(reboot="nouveau has the card")
            if any(gpu["driver"] == "nouveau" for gpu in found["gpus"])
            else Loading(load=True)
        )
    # What driver() is about to install is on no disk yet; without an exact version, any loaded module is then wrong.
    changing = bool(unfit(found, packages, branch, version))
    target = version if changing else apt.upstream(found["packages"][packages[0]])
    if found["loaded"] == target:
        mending = changing or found["damaged"] or not found["dkms_built"] or found["broken"] or found["interrupted"]
        if found["smi"]["status"] != 0 and not mending:
            raise silent(found, branch, version)
        return Loading()
    if found["users"]:
        return Loading(reboot=f"driver {found['loaded']} is in use by {', '.join(found['users'][:3])}")
    return Loading(reload=True)


def silent(found: Mapping[str, Any], branch: str, version: str | None) -> GpulabError:
    """nvidia-smi's own words, with the versions that should be equal."""
    log = [f"  {line}" for line in found["kernel_log"][-3:]]
    return GpulabError(
        "nvidia-smi does not answer",
        "\n".join(
            [
                f"It says: {found['smi']['output'] or 'nothing'} (exit status {found['smi']['status']})",
                versions.told(found, branch, version),
                *log,
            ]
        ),
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
    vmid: int | None = None,
    node: str | None = None,
) -> step.Commands:
    """
    Ensure that the kernel runs the installed driver and that nvidia-smi answers.

    A module of another version is replaced in place when nothing uses the GPU; otherwise the guest is rebooted, if
    it may be and if the kernel that boots next has the module. **Reboot**: only for a reason that the plan names.

    + packages: the driver's packages
    + branch: driver branch, such as `580`
    + allow_reboot: may the guest be rebooted?
    + reboot_timeout_s: seconds until SSH must answer again
    + version: exact driver version; None: any of the branch
    + vmid: the guest's VM, for the commands of a hint
    + node: its node, for the same
    """
    found = read(packages)
    require_gpu(found, vmid, node)
    loading = decide_loading(found, packages, branch, version)
    if not loading.any():
        step.noop(f"the kernel runs driver {found['loaded']}, and nvidia-smi answers")
        return
    why = versions.cause(found, packages, branch, version) if found else ""
    if loading.reboot:
        if not allow_reboot:
            raise GpulabError(
                f"{host.name} needs a reboot: {loading.reboot}; allow_reboot is false",
                why,
                "reboot it when it suits its users and deploy again, or set `allow_reboot`",
            )
        step.reboots(loading.reboot)
        yield step.call(require_bootable)
        yield step.call(reboot_and_wait, host, found["boot_id"], reboot_timeout_s)
    elif loading.reload:
        step.changes(
            f"replace the loaded NVIDIA module {found['loaded']} (nothing uses the GPU)", (why,) if why else ()
        )
        yield Told("sh", "-c", QuoteString(_RELOAD.strip()), "reload", explain=unloadable)
    else:
        step.changes("load the NVIDIA module")
    if not loading.reload:
        # After a reboot this makes sure of nvidia_uvm and of its device node.
        yield Told("modprobe", "-a", "nvidia", "nvidia_uvm", explain=unloadable)
    yield step.call(check_loaded, list(packages), branch, version)


def unloadable(output: str) -> GpulabError:
    """Why modprobe or rmmod failed, from what they printed."""
    said = next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "nothing")
    if re.search(r"Key was rejected by service|Required key not available", output):
        return refused_by_secure_boot(said)
    if "not found in directory" in output:
        hint = "`dkms status` in the guest; the next deploy builds it for the running kernel"
    elif re.search(r"Exec format error|Unknown symbol|Invalid module format", output):
        hint = "the module was built for another kernel: `dkms status` and `uname -r` in the guest"
    elif "No such device" in output:
        hint = "the driver finds no card that it knows: `dmesg | grep -i nvrm` in the guest"
    elif re.search(r"rmmod: ERROR: Module \S+ is in use", output):
        hint = "`lsmod | grep nvidia` and `nvidia-smi` in the guest show by whom; a reboot replaces it, too"
    else:
        hint = "`dmesg | tail` in the guest says why"
    return GpulabError("The NVIDIA module could not be loaded", f"It says: {said}", hint)


def check_loaded(packages: Sequence[str], branch: str, version: str | None) -> None:
    """
    Raises:
        GpulabError: the loaded module is not the installed one, or nvidia-smi does not answer.
    """
    found = read(packages)
    require_gpu(found)
    if decide_loading(found, packages, branch, version).any():
        raise GpulabError(
            f"The kernel still runs NVIDIA module {found['loaded'] or 'none'}, not {found['on_disk']}",
            f"In use by: {', '.join(found['users']) or 'no process'}\n{versions.told(found, branch, version)}",
            "`dmesg | grep -i nvrm` in the guest says why; a reboot of the guest loads the installed one",
        )

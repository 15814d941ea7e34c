# SPDX-License-Identifier: MIT
"""The guest's kernels: one that has no NVIDIA module is not booted, whatever unattended upgrades installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyinfra import host, logger
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import apt, files, step
from operations.files import File, render
from operations.nvidia.facts import KernelFacts
from operations.plan import file_diff

#: Read after every other file of that folder.
DROPIN = "/etc/default/grub.d/zz-gpulab-kernel.cfg"

# DKMS goes on to its other modules after one that fails; whether ours was built is asked afterwards. What DKMS takes
# for installed although its file is gone, it only installs again when forced.
BUILD = """
dkms autoinstall -k "$1" || echo "dkms autoinstall ended with $?"
if [ -n "$2" ] && ! modinfo -k "$1" nvidia > /dev/null 2>&1; then
    dkms install --force "$2" -k "$1" || echo "dkms install ended with $?"
fi
"""


@dataclass(frozen=True)
class Actions:
    """What has to happen. `build`: kernels to build the module for; `dropin`: GRUB's default, None: GRUB's own."""

    headers: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    dropin: str | None = None
    regenerate: bool = False

    def any(self) -> bool:
        return bool(self.build) or self.regenerate


def boots_next(found: Mapping[str, Any]) -> str:
    """The release of the kernel that boots next; the running one where that can't be told."""
    grub = found["grub"]
    if grub is None or not grub["entries"]:
        return str(found["running"])
    entries = grub["entries"]
    wanted = grub["default"]
    fitting = [entry for entry in entries if wanted in (entry["path"], entry["path"].rpartition(">")[2])]
    # GRUB falls back to its first entry when there is none of that name.
    return str((fitting or entries)[0]["release"])


def newest(found: Mapping[str, Any]) -> str:
    """The kernel that GRUB's own order boots: the first of its menu."""
    grub = found["grub"]
    return str(grub["entries"][0]["release"] if grub and grub["entries"] else found["running"])


def entry_of(found: Mapping[str, Any], release: str) -> str | None:
    """GRUB's path of a kernel's entry; None: it has none of its own (only the newest has a short way)."""
    paths = [entry["path"] for entry in found["grub"]["entries"] if entry["release"] == release]
    inside = [path for path in paths if ">" in path]
    # Only what stands in the submenu carries the kernel's name in its id.
    return (inside or [path for path in paths if release in path] or [None])[0]


def without_module(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The kernels that are newer than the running one, or boot next, and have no module."""
    names = [kernel["release"] for kernel in found["kernels"]]
    newer = set(names[names.index(found["running"]) + 1 :]) | {boots_next(found), newest(found)}
    return [
        kernel
        for kernel in found["kernels"]
        if kernel["module"] is None and kernel["release"] in newer and kernel["release"] != found["running"]
    ]


def kept(found: Mapping[str, Any]) -> str | None:
    """The drop-in that keeps the running kernel GRUB's default, while the newest has no module; None: none is needed.

    Raises:
        GpulabError: GRUB has no entry for the running kernel.
    """
    failed = newest(found)
    modules = {kernel["release"]: kernel["module"] for kernel in found["kernels"]}
    if failed == found["running"] or modules.get(failed) is not None:
        return None
    entry = entry_of(found, found["running"])
    if entry is None:
        raise GpulabError(
            f"Kernel {failed} has no NVIDIA module, and the running one can't be kept as the default",
            f"GRUB's menu has no entry for {found['running']}.",
            f"do not reboot the guest; remove linux-image-{failed} there, or install a driver that builds for it",
        )
    return render("nvidia/zz-gpulab-kernel.cfg.j2", kernel=failed, source=found["source"] or "no driver", entry=entry)


def decide(found: Mapping[str, Any]) -> Actions:
    """What has to happen for the next boot to have NVIDIA's module.

    A kernel that the drop-in already names with the same driver was tried, and is not tried again.
    """
    if not found or found["grub"] is None:
        return Actions()
    # A running kernel that GRUB does not know is an error only when the newest can't be built for, either.
    dropin = kept(found) if entry_of(found, found["running"]) else None
    if dropin is not None and dropin == found["dropin"]:
        return Actions(dropin=dropin, regenerate=boots_next(found) != found["running"])
    missing = without_module(found) if found["source"] else []
    return Actions(
        headers=tuple(
            f"linux-headers-{kernel['release']}"
            for kernel in missing
            if not kernel["headers"] and kernel["headers_exist"]
        ),
        build=tuple(kernel["release"] for kernel in missing),
        dropin=dropin,
        regenerate=dropin != found["dropin"],
    )


def told(found: Mapping[str, Any]) -> str:
    """Which kernel boots next, and why."""
    if found["grub"] is None:
        return f"no GRUB here: the guest boots {found['running']}, its only kernel"
    following = boots_next(found)
    modules = {kernel["release"]: kernel["module"] for kernel in found["kernels"]}
    if following != newest(found):
        kernel = re.search(r"^# .* kernel (\S+)", found["dropin"] or "", re.MULTILINE)
        why = f"{kernel[1]} has no NVIDIA module" if kernel else "GRUB is set so"
        return f"kernel {following} boots next: {why}"
    if following == found["running"]:
        return f"kernel {following} boots next: it runs now"
    module = modules.get(following)
    return f"kernel {following} boots next: NVIDIA {module} is built for it"


@step.step
def kernels() -> step.Commands:
    """
    Ensure that the kernel that boots next has NVIDIA's module.

    For a newer kernel than the running one, headers are installed and the module is built. Where it does not build,
    the running kernel stays GRUB's default, until there is a driver that does. **Reboot**: never by this step.
    """
    found = step.read(KernelFacts, dropin=DROPIN)
    actions = decide(found)
    if not actions.any():
        step.noop(told(found) if found else "a new guest boots its only kernel")
        return
    for release in actions.build:
        step.changes(f"build the NVIDIA module for kernel {release}", ("it is newer than the running one",))
    if actions.headers:
        step.changes(f"install {', '.join(actions.headers)}")
    if actions.regenerate and not actions.build:
        step.changes(f"file {DROPIN}", file_diff(found["dropin"], actions.dropin))
    if actions.headers:
        yield apt.install(actions.headers)
    for release in actions.build:
        words = [QuoteString(word) for word in (release, found["source"])]
        yield StringCommand("sh", "-c", QuoteString(BUILD.strip()), "build", *words)
    # Only now it is known which kernels have a module.
    yield step.call(keep_default)


def keep_default() -> None:
    """Write or remove the drop-in, as the modules on the disk want it, and have GRUB read it.

    Raises:
        GpulabError: the running kernel can't be kept, or GRUB does not take it.
    """
    found = step.read(KernelFacts, dropin=DROPIN)
    dropin = kept(found)
    if dropin is not None:
        logger.warning(
            f"{host.print_prefix}kernel {newest(found)} has no NVIDIA module: {found['running']} stays the default"
        )
    if dropin != found["dropin"]:
        _run(files.write({DROPIN: None if dropin is None else File(dropin)}))
    elif boots_next(found) == (found["running"] if dropin else newest(found)):
        return
    _run(StringCommand("update-grub"))
    require_module(step.read(KernelFacts, dropin=DROPIN))


def require_bootable() -> None:
    """
    Raises:
        GpulabError: the kernel that boots next has no NVIDIA module: a reboot would lose the GPU.
    """
    require_module(step.read(KernelFacts, dropin=DROPIN))


def require_module(found: Mapping[str, Any]) -> None:
    """
    Raises:
        GpulabError: the kernel that boots next has no NVIDIA module.
    """
    following = boots_next(found)
    modules = {kernel["release"]: kernel["module"] for kernel in found["kernels"]}
    if modules.get(following) is None:
        raise GpulabError(
            f"The kernel that would boot next, {following}, has no NVIDIA module",
            f"The guest runs {found['running']} and was not rebooted.",
            f"`dkms build {found['source'] or 'nvidia'} -k {following}` in the guest says why; GRUB_DEFAULT in "
            "/etc/default/grub.d chooses another kernel",
        )


def _run(command: StringCommand) -> None:
    """
    Raises:
        GpulabError: the command fails.
    """
    sudo = bool((host.current_op_global_arguments or {}).get("_sudo", False))
    done, output = host.run_shell_command(
        command, print_output=False, print_input=False, _sudo=sudo, **command.connector_arguments
    )
    if not done:
        raise GpulabError(f"{host.name}: GRUB's default could not be set", output.stderr or output.stdout)

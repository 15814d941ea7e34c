# SPDX-License-Identifier: MIT
"""Runs the scripts of an initramfs that come before udev, really, on the simulated machine.

`main` is called in a process with mounts of its own. It makes a root folder of the initramfs, the laid-out machine and
this system's shell and tools, and runs the scripts in it by chroot: they see the paths that they name and nothing else,
so none of them can reach the real /sys. What they write to drivers_probe, and what they ask of modprobe, takes effect
at once, as the kernel would have it.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rehearsal.node import initramfs
from rehearsal.node.hardware import Device, Kernel, Machine, driver_of, lay_out, module_config, show_driver
from rehearsal.node.written import WrittenFiles

#: The files that act, in the root folder; where a script looks for them are links to here.
_ACTING = "lab"
_MODPROBE = f"""\
#!/bin/sh
# Stand-in for modprobe in the initramfs (simulated): the kernel that it asks knows the modules of the archive.
quiet=
while [ $# -gt 0 ]; do
    case $1 in
        -q | --quiet) quiet=1 ;;
        -b | --use-blacklist | -v | -s | --) ;;
        -*) echo "modprobe: option $1 is not simulated" >&2; exit 1 ;;
        *) break ;;
    esac
    shift
done
echo "$*" 2> /dev/null > /{_ACTING}/modprobe && exit
[ -n "$quiet" ] || echo "modprobe: FATAL: Module $1 not found in the initramfs (simulated)" >&2
exit 1
"""


def main(described: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `hardware.InitTop`. `described`: machine, cmdline, files of the initramfs, and an empty folder."""
    root, files = Path(described["folder"]), described["files"]
    config = module_config(files, described["cmdline"])
    kernel = Kernel(_machine(described["machine"]), described["cmdline"], config, initramfs.modules(files))
    run = _Run(root, kernel)
    _make_root(root, files, kernel)
    with WrittenFiles(root / _ACTING, {"drivers_probe": run.probe, "modprobe": run.modprobe, "kmsg": run.log}):
        for script in initramfs.scripts(files):
            run.script(script)
    run.read_overrides()
    state = kernel.booted()
    return {
        "overrides": state.overrides,
        "drivers": state.drivers,
        "modules": state.modules,
        "messages": run.messages,
        "options": state.options,
    }


def _machine(described: Mapping[str, Any]) -> Machine:
    devices = [Device(**{key: _frozen(value) for key, value in entry.items()}) for entry in described["devices"]]
    return Machine(**{**described, "devices": tuple(devices), "kernels": tuple(described["kernels"])})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _make_root(root: Path, files: Mapping[str, str], kernel: Kernel) -> None:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    lay_out(root, kernel.booted())
    for name in ("dev", "tmp", "run", _ACTING, "usr/sbin", "usr/bin", "usr/lib", "usr/lib64"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        if not (root / name).exists():
            (root / name).symlink_to(f"usr/{name}")
        if name != "sbin" and Path("/usr", name).is_dir():
            _bind(f"/usr/{name}", root / "usr" / name)
    (root / "usr/sbin/modprobe").write_text(_MODPROBE)
    (root / "usr/sbin/modprobe").chmod(0o755)
    (root / "dev/null").touch()
    _bind("/dev/null", root / "dev/null")
    (root / "dev/kmsg").symlink_to(f"/{_ACTING}/kmsg")
    (root / "sys/bus/pci/drivers_probe").symlink_to(f"/{_ACTING}/drivers_probe")


def _bind(source: str, target: Path) -> None:
    # --rbind: without privileges a part of what is mounted there must not be uncovered.
    subprocess.run(["mount", "--rbind", source, str(target)], check=True)


class _Run:
    """One run of the scripts: hands what they do to the kernel, and shows what comes of it."""

    def __init__(self, root: Path, kernel: Kernel) -> None:
        self.messages: list[str] = []
        self._root = root
        self._sys = root / "sys"
        self._kernel = kernel

    def script(self, path: str) -> None:
        """Run one; what it says on the console is a line of the log, and what it ends with is nobody's business."""
        done = subprocess.run(
            ["chroot", str(self._root), "/bin/sh", f"/{path}"],
            env={"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "rootmnt": "/root"},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        self.messages += [f"{path}: {line}" for line in done.stdout.splitlines()]

    def log(self, text: str) -> None:
        self.messages += text.splitlines()

    def probe(self, text: str) -> None:
        self.read_overrides()
        before = dict(self._kernel.drivers)
        try:
            self._kernel.probe(text.strip())
        except KeyError:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None
        self._show(before)

    def modprobe(self, text: str) -> None:
        """`MODULE [OPTION…]`."""
        self.read_overrides()
        before = dict(self._kernel.drivers)
        named, *options = text.split()
        name = named.replace("-", "_")
        if options and name not in self._kernel.modules:
            self._kernel.options.setdefault(name, []).extend(options)
        if not self._kernel.load(name):
            raise OSError(errno.ENOENT, name)
        for module in self._kernel.modules:
            if module == "vfio_pci" or any(module in device.drivers for device in self._kernel.machine.devices):
                (self._sys / "bus/pci/drivers" / driver_of(module)).mkdir(exist_ok=True)
        self._show(before)

    def read_overrides(self) -> None:
        """What the files say now. An empty line takes an override away."""
        for device in self._kernel.machine.devices:
            value = (self._sys / "bus/pci/devices" / device.address / "driver_override").read_text().strip()
            self._kernel.overrides.pop(device.address, None)
            if value not in ("", "(null)"):
                self._kernel.overrides[device.address] = value

    def _show(self, before: Mapping[str, str]) -> None:
        for address, driver in self._kernel.drivers.items():
            if address not in before:
                show_driver(self._sys, address, driver)

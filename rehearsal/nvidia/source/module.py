# SPDX-License-Identifier: MIT
"""The simulated NVIDIA kernel module: what modprobe, rmmod, lsmod, modinfo and dkms say and do about it.

It runs in the guest, installed as /usr/lib/nvidia-simulated/module.py; the wrappers in front of it pass on every
other module to the real tools. "Loading" lays out what the real driver would show: /dev/nvidia*,
/proc/driver/nvidia, /sys/module/nvidia, a line of /proc/modules, and the card's state in /run/lab-gpu.

Two commands are the lab's own: `module.py xid NUMBER [ADDRESS]` reports an error as the driver does in the kernel's
log, `module.py fall-off [ADDRESS]` takes the card off the bus until the next boot. The journal has what they say under
the kernel's name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HARDWARE = Path("/var/lib/lab-hardware")
STATE = Path("/run/lab-gpu")
LOADED = STATE / "modules"
KERNEL = os.uname().release
BUILT = Path(f"/lib/modules/{KERNEL}/updates/dkms")
SOURCES = Path("/usr/src")
FIRMWARE = Path("/usr/lib/firmware/nvidia")
PCI = Path("/run/lab-hardware/pci")
TREE = Path("/var/lib/dkms/nvidia")

#: What each module needs loaded before it.
NEEDS = {
    "nvidia": [],
    "nvidia_uvm": ["nvidia"],
    "nvidia_modeset": ["nvidia"],
    "nvidia_drm": ["nvidia_modeset", "nvidia"],
}
SIZES = {"nvidia": 14381056, "nvidia_uvm": 2166784, "nvidia_modeset": 1859584, "nvidia_drm": 139264}
#: Name, major, minor. nvidia-uvm's major is given out by the kernel at load time; any free one will do.
UVM_MAJOR = 511
NODES = [("nvidiactl", 195, 255)]
UVM_NODES = [("nvidia-uvm", UVM_MAJOR, 0), ("nvidia-uvm-tools", UVM_MAJOR, 1)]
MODESET_NODES = [("nvidia-modeset", 195, 254)]
#: gpu.h: eight devices, and of each record of a process its 32 bytes, 128 times.
CARDS = 8
ACCOUNTING = 32 * 128
#: How the driver names an error after its number; the others say `simulated` alone.
XIDS = {
    13: "Graphics Exception: ESR 0x404490=0x80000001",
    31: "Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPCCLIENT_T1_0 faulted @ 0x7f45_1a000000.",
    43: "Ch 00000008",
    45: "Ch 00000008",
    48: "DBE (double bit error) ECC Error",
    63: "Row Remapper: New row marked for remapping, reset gpu to activate.",
    64: "Row Remapper: Error, failed to remap row.",
    79: "GPU has fallen off the bus.",
    94: "Contained: SM (0x1).",
    95: "Uncontained: FBHUB.",
    119: "Timeout after 6s of waiting for RPC response from GPU0 GSP!",
}


class Refused(Exception):
    """The real tool's message, and its exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def devices() -> list[dict[str, str]]:
    """The NVIDIA display functions that this guest was given."""
    try:
        given = json.loads((HARDWARE / "gpu.json").read_text())["devices"]
    except FileNotFoundError:
        return []
    # A card's audio function has an id of its own, and the display driver takes no notice of it.
    displays = [device for device in given if device["id"].startswith("10de:") and device["class"].startswith("0x03")]
    return [device for device in displays if not (STATE / "off-bus" / device["address"]).exists()]


def fault(key: str) -> str | None:
    """A value of the fault file (`key=value` lines), or None."""
    return value_in("nvml.conf", key)


def inforom(key: str) -> str | None:
    """What the card keeps over reboots, as libnvidia-ml wrote it, or None."""
    return value_in("inforom", key)


def value_in(file: str, key: str) -> str | None:
    try:
        lines = (HARDWARE / file).read_text().splitlines()
    except FileNotFoundError:
        return None
    return next((line.partition("=")[2].strip() for line in lines if line.partition("=")[0].strip() == key), None)


def built(kernel: str) -> Path:
    """Where DKMS puts the modules of a kernel."""
    return BUILT if kernel == KERNEL else BUILT.parents[2] / kernel / "updates/dkms"


def built_version(kernel: str = "") -> str | None:
    """The version of the module on disk for a kernel: what stands in the simulated one, what the real one's file says.

    A real one is there where the real dkms built it, for a kernel of Debian. No name: the running kernel.
    """
    kernel = kernel or KERNEL
    try:
        return (built(kernel) / "nvidia.ko").read_text().split()[-1]
    except (FileNotFoundError, UnicodeDecodeError):
        pass
    if not is_real(kernel):
        return None
    argv = [f"{DIVERTED}/modinfo", "-k", kernel, "-F", "version", "nvidia"]
    return subprocess.run(argv, capture_output=True, text=True, check=False).stdout.strip() or None


def is_real(kernel: str) -> bool:
    """Did the real dkms build the module?"""
    for path in built(kernel).glob("nvidia.ko*"):
        with open(path, "rb") as file:
            return file.read(9) != b"simulated"
    return False


def loaded() -> list[str]:
    """The simulated modules that are loaded, the last one first."""
    try:
        return LOADED.read_text().split()
    except FileNotFoundError:
        return []


def users(name: str) -> list[str]:
    """The loaded modules that need this one."""
    return [other for other in loaded() if name in NEEDS[other]]


def in_use() -> bool:
    """Does a process hold the card (NVML, CUDA, the persistence daemon)?"""
    # struct flock: type, whence, start, length, pid. F_GETLK answers with a lock in the way; length 0 is to the end.
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    with open(STATE / "clients", "rb") as clients:
        answer = fcntl.fcntl(clients, fcntl.F_GETLK, query)
    return bool(struct.unpack("hhqqi4x", answer)[0] != fcntl.F_UNLCK)


def kernel_says(*lines: str) -> None:
    """Into the journal under the kernel's name; journald listens before anything else of a boot."""
    text = "".join(f"{line} (simulated)\n" for line in lines)
    subprocess.run(["systemd-cat", "-t", "kernel", "-p", "err"], input=text, text=True, check=False)


def xid_line(number: int, address: str, process: str = "pid='<unknown>', name=<unknown>, ") -> str:
    """`NVRM: Xid (PCI:0000:01:00): 79, pid=…, GPU has fallen off the bus.`"""
    text = XIDS.get(number, "")
    return f"NVRM: Xid (PCI:{address.rpartition('.')[0]}): {number}, {process}{text}".rstrip(", ")


def load(name: str) -> None:
    version = built_version()
    if version is None:
        raise Refused(f"modprobe: FATAL: Module {name.replace('_', '-')} not found in directory /lib/modules/{KERNEL}")
    if name in loaded():
        return
    if not devices():
        raise Refused(f"modprobe: ERROR: could not insert '{name}': No such device")
    if reason := fault("modprobe_error"):
        raise Refused(f"modprobe: ERROR: could not insert '{name}': {reason}")
    for needed in reversed(NEEDS[name]):
        load(needed)
    if name == "nvidia":
        show_driver(version)
        if number := fault("xid"):
            kernel_says(*(xid_line(int(number, 0), card["address"]) for card in devices()))
    make_nodes({"nvidia_uvm": UVM_NODES, "nvidia_modeset": MODESET_NODES}.get(name, []))
    LOADED.write_text("\n".join([name, *loaded()]) + "\n")
    show_modules()


def unload(name: str) -> None:
    if name not in loaded():
        raise Refused(f"rmmod: ERROR: Module {name} is not currently loaded")
    if holders := users(name):
        raise Refused(f"rmmod: ERROR: Module {name} is in use by: {' '.join(holders)}")
    if in_use():
        raise Refused(f"rmmod: ERROR: Module {name} is in use")
    LOADED.write_text("".join(f"{other}\n" for other in loaded() if other != name))
    if name == "nvidia":
        hide_driver()
    show_modules()


def uuid_of(device: dict[str, str]) -> str:
    """The card's UUID: as declared, else made from its address, so that it stays the same over reboots."""
    return device.get("uuid") or f"GPU-51a7ed00-0000-4000-8000-{int(device['address'].translate(DIGITS), 16):012x}"


DIGITS = str.maketrans("", "", ":.")


def show_driver(version: str) -> None:
    """Lay out what the loaded driver shows. The file `driver` comes last: with it the card answers."""
    STATE.mkdir(exist_ok=True)
    cards = devices()
    (STATE / "settings").write_bytes(settings(len(cards)))
    (STATE / "clients").touch()
    # Processes write their own records, whoever runs them.
    (STATE / "accounting").write_bytes(bytes(ACCOUNTING))
    (STATE / "accounting").chmod(0o666)
    make_nodes([*NODES, *((f"nvidia{number}", 195, number) for number in range(len(cards)))])
    mount_tmpfs(Path("/proc/driver"))
    write(Path("/proc/driver/nvidia/version"), version_text(version))
    for card in cards:
        information = f"Model: \t\t NVIDIA RTX A4000 (simulated)\nGPU UUID: \t {uuid_of(card)}\n"
        write(Path(f"/proc/driver/nvidia/gpus/{card['address']}/information"), information)
        bind_driver(card["address"], "nvidia")
    lines = [f"device={card['address']} {ids(card)} {uuid_of(card)}" for card in usable(cards, version)]
    (STATE / "driver").write_text("\n".join([f"version={version}", *lines]) + "\n")


def settings(cards: int) -> bytes:
    """The card's settings after a reset (gpu.h): none but the ECC mode, which the card keeps without power."""
    modes = [int(inforom(f"{index}.ecc") or "0") if index < cards else 0 for index in range(CARDS)]
    return struct.pack(f"{CARDS}I", *modes).ljust(4096, b"\0")


def usable(cards: list[dict[str, str]], version: str) -> list[dict[str, str]]:
    """The cards that the driver can start: all, or none without the GSP firmware of its own version.

    The real driver looks for it each time that somebody opens an unused card; here it is looked for once.
    """
    name = f"nvidia/{version}/gsp_ga10x.bin"
    if (FIRMWARE / version / "gsp_ga10x.bin").exists():
        return cards
    for number, card in enumerate(cards):
        kernel_says(
            f"nvidia {card['address']}: Direct firmware load for {name} failed with error -2",
            "NVRM: RmFetchGspRmImages: No firmware image found",
            f"NVRM: GPU {card['address']}: RmInitAdapter failed! (0x61:0x56:1697)",
            f"NVRM: GPU {card['address']}: rm_init_adapter failed, device minor number {number}",
        )
    return []


def hide_driver() -> None:
    for name in ("driver", "settings", "clients", "accounting"):
        (STATE / name).unlink(missing_ok=True)
    for card in devices():
        bind_driver(card["address"], None)
    run("umount", "/proc/driver")


def ids(card: dict[str, str]) -> str:
    """`vendor:device subsystem` as gpu.c reads them, the subsystem's device before its vendor."""
    vendor, device = card["subsystem"].split(":")
    return f"{card['id']} {device}{vendor}"


def version_text(version: str) -> str:
    return (
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}  Release Build  (simulated)\n"
        "GCC version:  none: this driver is simulated\n"
    )


def bind_driver(address: str, driver: str | None) -> None:
    """The `driver` link that lspci -k follows, where lab-gpu.service laid out the device."""
    device = PCI / address
    link = device / "driver"
    link.unlink(missing_ok=True)
    if driver and device.is_dir():
        # lspci resolves the link, and only as a relative one: its target must exist, beside it.
        (device / "drivers" / driver).mkdir(parents=True, exist_ok=True)
        link.symlink_to(f"drivers/{driver}")


def make_nodes(nodes: Sequence[tuple[str, int, int]]) -> None:
    """Device nodes, open to all as the real ones; they outlive the module, as the real ones do."""
    for name, major, minor in nodes:
        path = Path("/dev") / name
        if path.exists():
            continue
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        path.chmod(0o666)


def show_modules() -> None:
    """/sys/module/* of the loaded modules, and /proc/modules where this kernel has that file."""
    folder = Path("/sys/module")
    if not folder.exists():
        # /sys of a container is a read-only tmpfs without this folder.
        run("mount", "-o", "remount,rw", "/sys")
        folder.mkdir()
        run("mount", "-o", "remount,ro", "/sys")
    if not is_mounted(folder):
        run("mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "simulated", str(folder))
    for name in NEEDS:
        shutil.rmtree(folder / name, ignore_errors=True)
    version = built_version() if not (STATE / "driver").exists() else loaded_version()
    for name in loaded():
        files = {"refcnt": str(len(users(name))), "initstate": "live", "coresize": str(SIZES[name]), "version": version}
        for file, text in files.items():
            write(folder / name / file, f"{text}\n")
        (folder / name / "holders").mkdir()
        for holder in users(name):
            (folder / name / "holders" / holder).symlink_to(f"../../{holder}")
    if Path("/proc/modules").exists():
        if is_mounted(Path("/proc/modules")):
            run("umount", "/proc/modules")
        others = Path("/proc/modules").read_text()
        (STATE / "proc-modules").write_text(module_lines() + others)
        run("mount", "--bind", str(STATE / "proc-modules"), "/proc/modules")


def loaded_version() -> str:
    return (STATE / "driver").read_text().split()[0].partition("=")[2]


def module_lines() -> str:
    """The loaded modules as /proc/modules has them."""
    lines = ""
    for name in loaded():
        by = users(name)
        lines += f"{name} {SIZES[name]} {len(by)} {','.join(by) + ',' if by else '-'} Live 0x0000000000000000 (OE)\n"
    return lines


def mount_tmpfs(folder: Path) -> None:
    if not is_mounted(folder):
        run("mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "simulated", str(folder))


def is_mounted(path: Path) -> bool:
    with open("/proc/self/mounts") as mounts:
        return any(line.split()[1] == str(path) for line in mounts)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def run(*argv: str) -> None:
    subprocess.run(argv, check=True)


# The commands


def module_name(word: str) -> str:
    return word.removesuffix(".ko").replace("-", "_")


def modprobe(words: list[str]) -> None:
    names = [module_name(word) for word in words if not word.startswith("-") and "=" not in word]
    flags = [word for word in words if word.startswith("-")]
    removing = any(flag in ("-r", "--remove") for flag in flags)
    if any(flag in ("-n", "--dry-run", "--show") for flag in flags):
        return
    # Without -a the words after the first are the module's parameters.
    many = removing or any(flag in ("-a", "--all") for flag in flags)
    for name in names if many else names[:1]:
        if name not in NEEDS:
            run(f"{DIVERTED}/modprobe", *flags, name)
        elif not removing:
            load(name)
        elif name in loaded():
            unload(name)


def rmmod(words: list[str]) -> None:
    refusals = []
    for name in [module_name(word) for word in words if not word.startswith("-")]:
        try:
            if name in NEEDS:
                unload(name)
            else:
                run(f"{DIVERTED}/rmmod", name)
        except Refused as refused:
            # The real tool goes on to the next module as well.
            refusals.append(str(refused))
    if refusals:
        raise Refused("\n".join(refusals))


def lsmod(words: list[str]) -> None:
    """As kmod prints it; on a kernel without loadable modules there is no /proc/modules to read."""
    try:
        lines = Path("/proc/modules").read_text().splitlines()
    except FileNotFoundError:
        lines = module_lines().splitlines()
    print("Module                  Size  Used by")
    for name, size, count, by, *_ in (line.split() for line in lines):
        print(f"{name:<19} {int(size):8d}  {count} {by.strip(',').replace('-', '')}".rstrip())


def modinfo(words: list[str]) -> None:
    field = ""
    kernel = KERNEL
    names = []
    rest = iter(words)
    for word in rest:
        if word in ("-F", "--field"):
            field = next(rest)
        elif word.startswith(("-F", "--field=")):
            field = word.removeprefix("--field=").removeprefix("-F")
        elif word == "-k":
            kernel = next(rest)
        elif not word.startswith("-"):
            names.append(module_name(word))
    if is_real(kernel):
        run(f"{DIVERTED}/modinfo", *words)
        return
    version = built_version(kernel)
    for name in names:
        if version is None:
            raise Refused(f"modinfo: ERROR: Module {name} not found.")
        fields = {
            "filename": str(built(kernel) / f"{name.replace('_', '-')}.ko"),
            "license": "Dual MIT/GPL",
            "version": version,
            "description": "simulated",
            "vermagic": f"{kernel} SMP preempt mod_unload modversions",
        }
        if field:
            print(fields.get(field, ""), end="\n" if field in fields else "")
        else:
            print("".join(f"{key + ':':<16}{value}\n" for key, value in fields.items()), end="")


def dkms(words: list[str]) -> None:
    """`status`, `autoinstall` and `install`, and what the packages call: `build VERSION` and `remove VERSION`."""
    kernel = words[words.index("-k") + 1].partition("/")[0] if "-k" in words[:-1] else KERNEL
    match [word for word in words if word not in ("-k", kernel)]:
        case ["build", version]:
            dkms_build(version.removeprefix("nvidia/"), kernel)
        case ["install", *rest]:
            for version in [word.removeprefix("nvidia/") for word in rest if not word.startswith("-")]:
                dkms_build(version, kernel)
        case ["remove", version]:
            shutil.rmtree(TREE / version, ignore_errors=True)
            for folder in {BUILT, *BUILT.parents[2].glob("*/updates/dkms")}:
                if is_simulated(folder, version):
                    for name in NEEDS:
                        (folder / f"{name.replace('_', '-')}.ko").unlink(missing_ok=True)
                    touch_modules_dep(folder)
        case ["status", *rest]:
            wanted = [word for word in rest if not word.startswith("-")]
            if wanted and not wanted[0].startswith("nvidia"):
                return
            for tree in sorted(TREE.glob("*")):
                # The real dkms keeps its own of a version here, too, without this file.
                for state in sorted(tree.glob("state*")):
                    print(f"nvidia/{tree.name}{state.read_text().rstrip()}")
        case ["autoinstall", *_]:
            for source in sorted(SOURCES.glob("nvidia-[0-9]*")):
                dkms_build(source.name.removeprefix("nvidia-"), kernel)
        case _:
            raise Refused(f"Error! The simulated dkms does not know `{' '.join(words)}`.")


def is_simulated(folder: Path, version: str) -> bool:
    """Does a folder hold simulated modules of this version?"""
    try:
        return (folder / "nvidia.ko").read_text().split()[-1] == version
    except (FileNotFoundError, UnicodeDecodeError):
        return False


def dkms_build(version: str, kernel: str) -> None:
    """ "Compile" for a kernel; a failure leaves it added, as a real one does.

    It fails for the fault `dkms=fail`, and for a source with the call that no kernel's headers take.
    """
    tree = TREE / version
    source = SOURCES / f"nvidia-{version}/nvidia.c"
    lines = source.read_text().splitlines() if source.exists() else []
    refused = [number for number, line in enumerate(lines, start=1) if "pci_resize_resource(pci_dev, 1)" in line]
    log = tree / "build/make.log"
    write(log, f"DKMS make.log for nvidia-{version} (simulated) for kernel {kernel}\n")
    state = tree / ("state" if kernel == KERNEL else f"state-{kernel}")
    write(state, ": added\n")
    if refused or fault("dkms") == "fail":
        error = (
            f"{tree}/build/nvidia.c:{refused[0]}:16: error: too few arguments to function 'pci_resize_resource'"
            if refused
            else "error: implicit declaration of function 'simulated_failure'"
        )
        write(log, f"{log.read_text()}{error}\n")
        raise Refused(
            f"Error! Bad return status for module build on kernel: {kernel} (x86_64)\n"
            f"Consult {log} for more information.",
            10,
        )
    for name in NEEDS:
        write(built(kernel) / f"{name.replace('_', '-')}.ko", f"simulated kernel module {name} {version}\n")
    write(state, f", {kernel}, x86_64: installed\n")
    touch_modules_dep(built(kernel))


def touch_modules_dep(folder: Path) -> None:
    """What depmod would write; nvidia-cdi-refresh.path watches it."""
    names = sorted(path.name for path in folder.glob("*.ko"))
    dep = folder.parent.parent / "modules.dep"
    kept = [line for line in dep.read_text().splitlines() if "updates/dkms/nvidia" not in line] if dep.exists() else []
    write(dep, "".join(f"{line}\n" for line in [*kept, *(f"updates/dkms/{name}:" for name in names)]))


def cards_named(words: list[str]) -> list[str]:
    """Addresses of the card that is named, or of all."""
    found = [card["address"] for card in devices() if not words or card["address"] in words]
    if not found:
        raise Refused(f"no card {' '.join(words)} in this guest".replace("  ", " "))
    return found


def xid(words: list[str]) -> None:
    """`xid NUMBER [ADDRESS]`: the driver reports an error of the card. NVML's event comes from the fault file."""
    if not words or not words[0].isdecimal():
        raise Refused("usage: module.py xid NUMBER [ADDRESS]", 2)
    kernel_says(*(xid_line(int(words[0]), address) for address in cards_named(words[1:])))


def fall_off(words: list[str]) -> None:
    """`fall-off [ADDRESS]`: nothing answers any more at the card's addresses, until the next boot."""
    for address in cards_named(words):
        write(STATE / "off-bus" / address, "simulated\n")
        for function in PCI.glob(f"{address.rpartition('.')[0]}.*"):
            # What the kernel read before stays in the other files: `lspci` keeps the revision (before pciutils 3.8 it
            # said `rev ff`), and `lspci -v` says `Unknown header type 7f`.
            (function / "config").write_bytes(b"\xff" * 256)
        kernel_says(
            xid_line(79, address),
            f"NVRM: GPU {address}: GPU has fallen off the bus.",
        )


DIVERTED = "/usr/lib/nvidia-simulated/real"
COMMANDS = {
    "modprobe": modprobe,
    "rmmod": rmmod,
    "lsmod": lsmod,
    "modinfo": modinfo,
    "dkms": dkms,
    "xid": xid,
    "fall-off": fall_off,
}


def main() -> int:
    try:
        COMMANDS[sys.argv[1]](sys.argv[2:])
    except Refused as refused:
        if not {"-q", "--quiet"} & set(sys.argv):
            print(refused, file=sys.stderr)
        return refused.status
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())

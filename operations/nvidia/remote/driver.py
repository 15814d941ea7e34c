# SPDX-License-Identifier: MIT
"""Runs on the guest: the GPU and its driver, from the PCI bus and the packages up to nvidia-smi."""

import glob
import os
import platform
import re
from typing import Any

from operations.remote.common import answer, run, text

#: The columns of `nvidia-smi --query-gpu`, in this order.
COLUMNS = "index,name,uuid,driver_version,persistence_mode,pci.bus_id,memory.total"
LIBRARIES = ("libcuda.so.1", "libnvidia-ml.so.1")
#: Where a new driver, its module and a new initramfs need space.
PLACES = ("/usr", "/var", "/boot")
#: dpkg's states of a package that is there as a whole, or not at all.
WHOLE = ("installed", "config-files", "not-installed", "triggers-awaited", "triggers-pending")


def read(package_names: list[str], blacklist: str, policy: bool) -> dict[str, Any]:
    """The driver's state. `policy`: also what apt would install next, which takes it a while to say."""
    kernel = platform.release()
    listed = listing()
    installed = {
        name: listed[name][0] if listed.get(name, ["", "", ""])[2] == "installed" else None for name in package_names
    }
    version = upstream(next((value for value in installed.values() if value), ""))
    loaded = (text("/sys/module/nvidia/version") or "").strip() or None
    on_disk = run("modinfo", "-F", "version", "nvidia")[1].strip() or None
    query = run("nvidia-smi", f"--query-gpu={COLUMNS}", "--format=csv,noheader,nounits", timeout=60)
    dkms = [line for line in run("dkms", "status")[1].splitlines() if line.startswith("nvidia")]
    # `nvidia/580.95.05, 6.12.48+deb13-amd64, x86_64: installed`; DKMS 2 has a comma behind the name.
    done = re.compile(rf"nvidia\S*(?:/|, ){re.escape(version)}, {re.escape(kernel)}, [^:]*:\s*installed")
    built = on_disk == version and any(done.match(line) for line in dkms)
    headers = listed.get(f"linux-headers-{kernel}", ["", "", ""])[2] == "installed"
    library = libraries()
    firmware = sorted({path.split("/")[4] for path in glob.glob("/lib/firmware/nvidia/[0-9][0-9][0-9].*/gsp*.bin*")})
    mismatch = bool(loaded and version and {loaded, *library.values()} != {version})
    return {
        "kernel": kernel,
        "boot_id": (text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "packages": installed,
        "related": {
            name: state[0]
            for name, state in sorted(listed.items())
            if state[2] == "installed" and re.search(r"nvidia|cuda|^libnv", name)
        },
        "held": sorted(name for name, state in listed.items() if state[1] == "hold"),
        "broken": {name: state[2] for name, state in sorted(listed.items()) if state[2] not in WHOLE},
        "interrupted": bool(glob.glob("/var/lib/dpkg/updates/*")),
        "headers": headers,
        # A kernel that is not the distribution's own has none.
        "headers_exist": headers or bool(run("apt-cache", "show", f"linux-headers-{kernel}")[1].strip()),
        "dkms": dkms,
        "dkms_built": built,
        "build_failure": None if built else newest_failure(kernel),
        "loaded": loaded,
        "on_disk": on_disk,
        "library": library,
        "firmware": firmware,
        "damaged": damaged(version, library, firmware) if version else {},
        "foreign": [] if not mismatch else foreign(),
        "changed_by": last_change(text("/var/log/apt/history.log") or "", package_names) if mismatch else "",
        "gpus": gpus(),
        "devices": sorted(glob.glob("/dev/nvidia*")),
        "users": users(),
        "smi": {"status": query[0], "output": (query[1] + query[2]).strip()},
        "kernel_log": kernel_log() if loaded and query[0] != 0 else [],
        "simulated": "simulated" in (text("/proc/driver/nvidia/version") or "").lower(),
        "secure_boot": secure_boot(),
        "mok_enrolled": any("already enrolled" in run("mokutil", "--test-key", key)[1] for key in MOK if text(key)),
        "blacklist": text(blacklist),
        "free_mib": {place: free_mib(place) for place in PLACES},
        "candidates": candidates(run("apt-cache", "policy", *package_names)[1]) if policy else {},
        "preferences": preferences() if policy else [],
    }


#: The keys that DKMS signs with: its own, and Ubuntu's.
MOK = ("/var/lib/dkms/mok.pub", "/var/lib/shim-signed/mok/MOK.der")


def listing() -> dict[str, list[str]]:
    """Version, wish and state of every package that dpkg knows."""
    form = "${Package}\t${Version}\t${db:Status-Want}\t${db:Status-Status}\n"
    lines = [line.split("\t") for line in run("dpkg-query", "-W", "-f", form)[1].splitlines()]
    return {name: state for name, *state in lines}


def upstream(version: str) -> str:
    """A Debian version without epoch and revision."""
    return version.rpartition(":")[2].rpartition("-")[0]


def libraries() -> dict[str, str | None]:
    """The version of the file that the loader takes for each library, None when it takes none."""
    found: dict[str, str | None] = dict.fromkeys(LIBRARIES)
    for line in run("/sbin/ldconfig", "-p")[1].splitlines():
        name = line.split()[0] if line.strip() else ""
        if name in found and found[name] is None and "x86-64" in line:
            path = os.path.realpath(line.rpartition("=> ")[2])
            if os.path.exists(path):
                found[name] = path.rpartition(".so.")[2]
    return found


def damaged(version: str, library: dict[str, str | None], firmware: list[str]) -> dict[str, list[str]]:
    """What of the installed version is not on the disk, and the packages that bring it."""
    gone = {
        name: f"*/{name.removesuffix('1')}{version}"
        for name in library
        if not glob.glob(f"/usr/lib/*/{name.removesuffix('1')}{version}")
        and not glob.glob(f"/usr/lib/*/nvidia/*/{name.removesuffix('1')}{version}")
    }
    if version not in firmware:
        gone["GSP firmware"] = f"*/firmware/nvidia/{version}/*"
    return {what: owners(pattern) for what, pattern in gone.items()}


def owners(pattern: str) -> list[str]:
    """The packages of the files that fit a pattern (or a path), whether the files are there or not."""
    lines = run("dpkg-query", "-S", pattern)[1].splitlines()
    return sorted({word.partition(":")[0] for line in lines for word in line.partition(": ")[0].split(", ")})


def foreign() -> list[str]:
    """Libraries of the driver that the loader takes and no package brought: NVIDIA's own installer did."""
    found = []
    for line in run("/sbin/ldconfig", "-p")[1].splitlines():
        if line.strip() and line.split()[0] in LIBRARIES and "x86-64" in line:
            path = os.path.realpath(line.rpartition("=> ")[2])
            # A package of before the merged /usr names the path without it.
            if os.path.exists(path) and not owners(path) and not owners(path.removeprefix("/usr")):
                found.append(path)
    return found


def last_change(history: str, names: list[str]) -> str:
    """The command line of the last run of apt that changed one of the packages."""
    for block in reversed(history.split("\n\n")):
        if any(f"{name}:" in block for name in names):
            command = re.search(r"^Commandline: (.+)$", block, re.MULTILINE)
            return command[1] if command else ""
    return ""


def newest_failure(kernel: str) -> dict[str, Any] | None:
    """What the newest build log of DKMS says, that of this kernel first; `kernel`: whose it is. None without one.

    Debian 13's DKMS builds for every kernel with headers and ends with the first that fails, which may be another.
    """
    logs = sorted(glob.glob("/var/lib/dkms/nvidia*/*/build/make.log"), key=os.path.getmtime, reverse=True)
    texts = [(path, text(path) or "") for path in logs]
    for path, log in sorted(texts, key=lambda pair: kernel not in pair[1]):
        of = re.search(r" for kernel:? (\S+)", log)
        return {**build_failure(log), "log": path, "kernel": kernel if kernel in log or of is None else of[1]}
    return None


#: What ends a build, the most telling first: in `file`, `line` and `error`.
FAILURES = (
    r"^(?P<file>[^\s:]+):(?P<line>\d+)(?::\d+)?: (?:fatal )?error: (?P<error>.+)$",
    r"^ERROR: (?P<error>modpost: .+)$",
    r"^(?:Error! )?(?P<error>Your kernel headers for kernel \S+ cannot be found)",
    r"(?P<error>No space left on device)",
    r"^(?:/bin/sh: \d+: |make(?:\[\d+\])?: )?(?P<error>\S+: (?:(?:command )?not found|No such file or directory))$",
    r"^(?:\S*/)?ld(?:\.\w+)?: (?P<error>.+)$",
    r"^(?P<error>make(?:\[\d+\])?: \*\*\* .+)$",
)


def build_failure(log: str) -> dict[str, Any]:
    """The first error of a build, as `file`, `line`, `error`, and how many follow; from DKMS' make.log."""
    folder = re.compile(r"^/?(?:\S*/)?(?:var/lib/)?dkms/[^/]+/[^/]+/build/")
    for pattern in FAILURES:
        found = list(re.finditer(pattern, log, re.MULTILINE))
        if found:
            words = found[0].groupdict()
            return {
                "file": folder.sub("", words.get("file") or ""),
                "line": int(words.get("line") or 0),
                # gcc's quotation marks, in some locales.
                "error": re.sub("[\u2018\u2019]", "'", words["error"].strip()),
                "more": len({match.group() for match in found}) - 1,
            }
    lines = [line for line in log.splitlines() if line.strip()]
    return {"file": "", "line": 0, "error": lines[-1].strip() if lines else "the log is empty", "more": 0}


def gpus() -> list[dict[str, Any]]:
    """The NVIDIA display devices on the PCI bus. `answers`: its configuration space does not read all ones."""
    found = []
    for folder in sorted(glob.glob("/sys/bus/pci/devices/*")):
        words = {name: (text(f"{folder}/{name}") or "").strip().removeprefix("0x") for name in ("vendor", "device")}
        kind = (text(f"{folder}/class") or "").strip().removeprefix("0x")
        if words["vendor"] == "10de" and kind.startswith("03"):
            driver = os.path.basename(os.path.realpath(f"{folder}/driver"))
            found.append(
                {
                    "address": os.path.basename(folder),
                    "id": f"{words['vendor']}:{words['device']}",
                    "driver": None if driver == "driver" else driver,
                    "answers": config_begins(folder) != b"\xff\xff\xff\xff",
                }
            )
    return found


def config_begins(folder: str) -> bytes:
    """Vendor and device as the card itself says them now; sysfs' own files remember what it said at boot."""
    try:
        with open(f"{folder}/config", "rb") as file:
            return file.read(4)
    except OSError:
        return b""


def users() -> list[str]:
    """The processes that keep the GPU open, other than the daemons that only serve others: `name (pid)`."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("/dev/nvidia"):
            pid = link.split("/")[2]
            # The kernel cuts it at 15 characters.
            name = (text(f"/proc/{pid}/comm") or "").strip()
            if name and not name.startswith(("nvidia-persiste", "nvidia-cuda-mps")):
                found.add(f"{name} ({pid})")
    return sorted(found)


def kernel_log() -> list[str]:
    """The last lines of the kernel about the card, of this boot."""
    kernel = ("_TRANSPORT=kernel", "+", "SYSLOG_IDENTIFIER=kernel")
    lines = run("journalctl", "-b", "-o", "cat", "--no-pager", "-q", *kernel)[1].splitlines()
    return [line.strip() for line in lines if "NVRM" in line or "nouveau" in line][-8:]


def secure_boot() -> bool:
    """Is it on? The firmware's own variable says so where there is no mokutil: four bytes of attributes, one of it."""
    status, said, _ = run("mokutil", "--sb-state")
    if status == 0:
        return "SecureBoot enabled" in said
    for path in glob.glob("/sys/firmware/efi/efivars/SecureBoot-*"):
        try:
            with open(path, "rb") as file:
                return file.read()[4:5] == b"\x01"
        except OSError:
            continue
    return False


def free_mib(place: str) -> int:
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize // 2**20


def candidates(policy: str) -> dict[str, str | None]:
    """The version of each package that apt would install, from `apt-cache policy`."""
    found: dict[str, str | None] = {}
    name = ""
    for line in policy.splitlines():
        if not line.startswith(" "):
            name = line.rstrip(":")
        elif line.startswith("  Candidate: "):
            version = line.split()[1]
            found[name] = None if version == "(none)" else version
    return found


def preferences() -> list[dict[str, str]]:
    """Every pin of the guest: its file and its fields in lower case."""
    found = []
    for path in [*sorted(glob.glob("/etc/apt/preferences.d/*")), "/etc/apt/preferences"]:
        for block in re.split(r"\n\s*\n", text(path) or ""):
            pairs = [line.partition(":") for line in block.splitlines() if line[:1] not in ("#", "")]
            fields = {key.strip().lower(): value.strip() for key, _, value in pairs}
            if "pin" in fields:
                found.append({"file": path, **fields})
    return found


if __name__ == "__main__":
    answer(read)

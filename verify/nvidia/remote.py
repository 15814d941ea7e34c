# SPDX-License-Identifier: MIT
"""Runs on the guest, as root: prints the driver's and the GPU's state as JSON and changes nothing.

NVML is read through `pynvml.py`, which the control machine puts into `folder` first; the folder is removed here.
Where nobody uses the card, a second of copies to it and back shows how its link and its clocks are under load. With
MPS, processes that hold the card and do nothing are no hindrance: one more client is what MPS is for.
"""

from __future__ import annotations

import json
import os
import pwd
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from verify.grub import grub_entry
from verify.nvidia.nvml import Question, asker, owner, processes, text, word

CONTROL = "nvidia-cuda-mps-control"
#: A user that has nothing to do with the GPU.
STRANGER = "nobody"
#: Seconds until a question to MPS counts as one that waits for ever.
ASK_S = 5.0
#: Seconds until a client that does not get on is ended, and that one of ours works.
CLIENT_S, WORK_S = 15, 1.0
#: Free MiB that the card must have for one of ours beside others.
ROOM_MIB = 1024
#: Seconds between two looks at the working card.
LOOK_S = 0.05

#: A client of the GPU: opens it, copies for a while, says `working` and then how much, or what CUDA said against it.
CLIENT = """
import ctypes, os, sys, time
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    if code:
        word = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(word))
        sys.exit(f"{name}: {(word.value or b'error').decode()} ({code})")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
size = 64 << 20
host = ctypes.create_string_buffer(os.urandom(1 << 20) * 64)
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), int(sys.argv[1]))
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(size))
print("working", flush=True)
end, rounds = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    call("cuMemcpyHtoD_v2", memory, host, ctypes.c_size_t(size))
    call("cuMemcpyDtoH_v2", host, memory, ctypes.c_size_t(size))
    rounds += 1
call("cuMemFree_v2", memory)
call("cuDevicePrimaryCtxRelease_v2", device)
print(rounds * 2 * size)
"""


def observe(arguments: dict[str, Any], root: Path = Path("/")) -> dict[str, Any]:
    """`arguments`: names of `packages`, `repositories` (URLs that apt must check), `folder` of pynvml.py, versions of
    `cuda` toolkits, `units`, folder of `tenants`, and of `mps` the user, its folders and whether there are `clients`.
    """
    proc = word(root / "proc/driver/nvidia/version")
    mps = arguments["mps"]
    # What takes longest is asked while the card works.
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(output, ["apt-cache", "policy", *arguments["packages"]])
        logged = pool.submit(output, ["journalctl", "-b", "-o", "cat", "--no-pager", "-q", *KERNEL])
        nvml = read_nvml(arguments["folder"], client_as(mps))
        answers, log = asked.result(), logged.result()
    says = {"the kernel module": proc or "", "NVML": json.dumps(nvml)}
    return {
        "on_bus": on_bus(root / "sys/bus/pci/devices"),
        "loaded": word(root / "sys/module/nvidia/version"),
        "on_disk": output(["modinfo", "-F", "version", "nvidia"]).strip() or None,
        "library": library(output(["/sbin/ldconfig", "-p"])),
        "firmware": firmware(root / "lib/firmware/nvidia"),
        "nouveau": nouveau(root),
        "next_kernel": next_kernel(root),
        "policy": {name: policy(answers, name) for name in arguments["packages"]},
        "installed": installed(),
        "held": held(output(["dpkg-query", "-W", "-f", "${Package}\t${db:Status-Want}\n"])),
        "apt": unattended(output(["apt-config", "dump"])),
        "sources": {url: sources(root / "etc/apt", url) for url in arguments["repositories"]},
        "cuda": {version: nvcc(version) for version in arguments["cuda"]},
        "xids": xids(log),
        "fallen": last_words(log),
        "units": {name: unit(name) for name in arguments["units"]},
        "nvml": nvml,
        # After the load: the first client starts MPS' server.
        "mps": read_mps(mps, root) if shutil.which(CONTROL) else None,
        "tenants": tenants(root / arguments["tenants"].lstrip("/")),
        "simulated": [name for name, text in says.items() if "simulated" in text.lower()],
    }


#: The kernel's own messages, and those that arrive under its name.
KERNEL = ("_TRANSPORT=kernel", "+", "SYSLOG_IDENTIFIER=kernel")


def xids(journal: str) -> list[int]:
    """Numbers of the Xid errors since boot, each once."""
    return sorted({int(number) for number in re.findall(r"NVRM: Xid \([^)]*\): ([0-9]+)", journal)})


def last_words(journal: str) -> str | None:
    """The kernel's last line about a GPU that fell off the bus."""
    said = [line.strip() for line in journal.splitlines() if "fallen off the bus" in line]
    return said[-1] if said else None


def on_bus(folder: Path) -> list[str]:
    """Addresses of the NVIDIA display devices on the PCI bus."""
    return [
        path.name
        for path in (sorted(folder.iterdir()) if folder.is_dir() else [])
        if word(path / "vendor") == "0x10de" and (word(path / "class") or "").startswith("0x03")
    ]


def library(cache: str) -> str | None:
    """The version of the NVML library that the loader takes, from the name of its file."""
    found = re.search(r"libnvidia-ml\.so\.1 \([^)]*x86-64[^)]*\) => (\S+)", cache)
    version = re.search(r"\.so\.([0-9]+(?:\.[0-9]+)+)$", os.path.realpath(found[1])) if found else None
    return version[1] if version else None


def firmware(folder: Path) -> list[str]:
    """The driver versions whose firmware for the card's own processor (GSP) is there."""
    return sorted({path.parent.name for path in folder.glob("*/gsp*.bin*")})


def nouveau(root: Path) -> dict[str, bool]:
    """Is it loaded, and would modprobe load it?"""
    lines = [
        line.split()
        for folder in ("etc/modprobe.d", "run/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d")
        for path in (root / folder).glob("*.conf")
        for line in (word(path) or "").splitlines()
    ]
    return {"loaded": (root / "sys/module/nouveau").is_dir(), "blacklisted": ["blacklist", "nouveau"] in lines}


def next_kernel(root: Path) -> dict[str, Any]:
    """The kernel that boots next, by GRUB's own menu, and the version of the NVIDIA module that is on disk for it.

    Where no GRUB boots the guest, it is the one that runs.
    """
    running, config = word(root / "proc/sys/kernel/osrelease") or "", word(root / "boot/grub/grub.cfg")
    entry = grub_entry(config, word(root / "boot/grub/grubenv") or "") if config else None
    kernel = entry["kernel"] if entry else running
    module = output(["modinfo", "-k", kernel, "-F", "version", "nvidia"]).strip() or None
    return {"running": running, "kernel": kernel, "module": module}


def policy(text: str, name: str) -> dict[str, Any]:
    """What `apt-cache policy` says of a package: installed, candidate, and the priority of each known version."""
    found: dict[str, Any] = {"installed": None, "candidate": None, "priorities": {}}
    current = False
    for line in text.splitlines():
        if not line.startswith(" "):
            current = line.rstrip(":") == name
        if not current:
            continue
        if field := re.match(r"  (Installed|Candidate): (\S+)", line):
            found[field[1].lower()] = None if field[2] == "(none)" else field[2]
        # Versions stand at column 5, or after the mark of the installed one; their origins further right.
        if version := re.match(r" (?:\*\*\*|   ) (\S+) (-?[0-9]+)$", line):
            found["priorities"][version[1]] = int(version[2])
    return found


def installed() -> dict[str, str]:
    """Version of every installed package that could belong to the driver or its tools."""
    form = "${Package}\t${Version}\t${db:Status-Status}\n"
    names = ("*nvidia*", "*cuda*", "libnv*", "unattended-upgrades")
    rows = [line.split("\t") for line in output(["dpkg-query", "-W", "-f", form, *names]).splitlines()]
    return {row[0]: row[1] for row in rows if len(row) == 3 and row[2] == "installed"}


def held(selections: str) -> list[str]:
    """The packages that are on hold, as `apt-mark showhold` has them from the same place, which takes a second."""
    rows = [line.split("\t") for line in selections.splitlines()]
    return [row[0] for row in rows if len(row) == 2 and row[1] == "hold"]


def unattended(dump: str) -> dict[str, Any]:
    """What apt's effective configuration tells unattended-upgrades: does it run, and what it leaves alone."""
    found = {"runs": "0", "blacklist": []}
    for key, value in re.findall(r'^(\S+) "(.*)";$', dump, re.MULTILINE):
        if key.lower() == "apt::periodic::unattended-upgrade":
            found["runs"] = value
        if key.lower() == "unattended-upgrade::package-blacklist::":
            found["blacklist"].append(value)  # type: ignore[attr-defined]
    return {**found, "runs": found["runs"] not in ("", "0")}


def sources(folder: Path, url: str) -> list[dict[str, Any]]:
    """apt's sources whose address begins with `url`: file, and how packages of it are trusted."""
    found = []
    files = [folder / "sources.list", *sorted((folder / "sources.list.d").glob("*"))]
    for path in files:
        text = word(path) if path.is_file() else None
        for signed, trusted, address in entries(path, text or ""):
            if address.startswith(url):
                found.append({"file": path.name, "signed_by": signed, "trusted": trusted})
    return found


def entries(path: Path, text: str) -> list[tuple[bool, bool, str]]:
    """Each source of a file: is it signed by a key of its own, does apt trust it unseen, its address."""
    found = []
    if path.suffix == ".sources":
        for block in re.split(r"\n\s*\n", text):
            lines = [line for line in block.splitlines() if not line.startswith("#")]
            fields = dict(re.findall(r"^([A-Za-z-]+):[ \t]*(.*(?:\n[ \t].*)*)", "\n".join(lines), re.M))
            keys = {key.lower(): value.strip() for key, value in fields.items()}
            if keys.get("enabled", "yes").lower() in ("no", "false"):
                continue
            trusted = keys.get("trusted", "no").lower() in ("yes", "true")
            found += [(bool(keys.get("signed-by")), trusted, address) for address in keys.get("uris", "").split()]
    elif path.suffix == ".list":
        for line in text.splitlines():
            source = re.match(r"\s*deb(?:\s+\[([^]]*)\])?\s+(\S+)", line)
            if source:
                options = source[1] or ""
                found.append(
                    ("signed-by=" in options, re.search(r"trusted=(yes|true)", options) is not None, source[2])
                )
    return found


def nvcc(version: str) -> str:
    """What the compiler of a toolkit says of its release, empty when it does not answer."""
    said = re.search(r"release ([0-9]+\.[0-9]+)", output([f"/usr/local/cuda-{version}/bin/nvcc", "--version"]))
    return said[1] if said else ""


def unit(name: str) -> dict[str, str]:
    """A unit's state in systemd's words: `active`, and whether it is `enabled`. Empty: there is none."""
    show = output(["systemctl", "show", "--property=ActiveState,UnitFileState,LoadState", name])
    keys = dict(line.partition("=")[::2] for line in show.splitlines())
    there = keys.get("LoadState") not in (None, "not-found")
    return {key: keys.get(field, "") if there else "" for key, field in FIELDS.items()}


FIELDS = {"active": "ActiveState", "enabled": "UnitFileState"}


# MPS.


def client_as(mps: dict[str, Any]) -> dict[str, Any]:
    """How a process of ours becomes a client: the arguments of Popen that MPS asks for, none without it."""
    if not mps["clients"]:
        return {}
    environment = {"CUDA_MPS_PIPE_DIRECTORY": mps["pipe"], "CUDA_MPS_LOG_DIRECTORY": mps["log"]}
    try:
        user = pwd.getpwnam(mps["user"])
    except KeyError:
        # Then there is no client: CUDA says so.
        return {"env": {**os.environ, **environment}}
    return {
        "env": {**os.environ, **environment},
        "user": user.pw_uid,
        "group": user.pw_gid,
        "extra_groups": [],
    }


def read_mps(mps: dict[str, Any], root: Path) -> dict[str, Any]:
    """The control daemon: its processes, its limits, its servers, and what it says to a stranger."""
    told = {name: ask(mps, command) for name, command in QUESTIONS.items()}
    pids = [int(pid) for pid in (told["servers"]["says"] or "").split() if pid.isdigit()]
    return {
        "daemons": daemons(root / "proc"),
        **told,
        "servers": [{"pid": pid, "uid": owner(root / f"proc/{pid}")} for pid in pids],
        "stranger": ask(mps, QUESTIONS["servers"], STRANGER),
    }


QUESTIONS = {
    "percentage": "get_default_active_thread_percentage",
    "memory": "get_default_device_pinned_mem_limit 0",
    "servers": "get_server_list",
}


def ask(mps: dict[str, Any], command: str, user: str | None = None) -> dict[str, Any]:
    """`status` and `says` of the control tool; a status of None: it was still waiting at the limit."""
    environment = {**os.environ, "CUDA_MPS_PIPE_DIRECTORY": mps["pipe"], "LC_ALL": "C"}
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n",
            env=environment,
            capture_output=True,
            text=True,
            timeout=ASK_S,
            user=user,
            group=pwd.getpwnam(user).pw_gid if user else None,
            extra_groups=[] if user else None,
        )
    except subprocess.TimeoutExpired:
        return {"status": None, "says": f"nothing within {ASK_S:.0f} s"}
    except OSError as error:
        return {"status": 127, "says": str(error)}
    return {"status": done.returncode, "says": (done.stdout + done.stderr).strip()}


def daemons(proc: Path) -> list[int]:
    """Process ids of MPS control daemons, whoever started them. The tool itself has no `-d` or `-f`."""
    found = []
    for path in proc.glob("[0-9]*/cmdline"):
        words = (word(path) or "").split("\0")
        if os.path.basename(words[0]) == CONTROL and {"-d", "-f"} & set(words[1:]):
            found.append(int(path.parent.name))
    return sorted(found)


def tenants(folder: Path) -> dict[str, dict[str, str]]:
    """The environment in each tenant's profile, as a shell reads it."""
    return {path.stem: variables(word(path) or "") for path in sorted(folder.glob("*.env"))}


def variables(text: str) -> dict[str, str]:
    words = [word for line in text.splitlines() if not line.lstrip().startswith("#") for word in shlex.split(line)]
    return {key: value for key, equals, value in (word.partition("=") for word in words) if equals}


# NVML.


def read_nvml(folder: str, client: dict[str, Any]) -> dict[str, Any]:
    """What NVML says: `error` when it can't be used, else the driver's version and its GPUs."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, folder)
    try:
        import pynvml
    finally:
        shutil.rmtree(folder)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"error": str(error), "gpus": []}
    try:
        count = pynvml.nvmlDeviceGetCount()
        return {
            "error": None,
            "driver": text(pynvml.nvmlSystemGetDriverVersion()),
            "gpus": [gpu(pynvml, index, client) for index in range(count)],
        }
    except pynvml.NVMLError as error:
        return {"error": str(error), "gpus": []}
    finally:
        pynvml.nvmlShutdown()


def gpu(nvml: Any, index: int, client: dict[str, Any]) -> dict[str, Any]:
    """One GPU, at rest and at work. None for what it or its driver does not answer."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    ask = asker(nvml, handle)
    pci = nvml.nvmlDeviceGetPciInfo(handle)
    memory = ask("nvmlDeviceGetMemoryInfo")
    ecc = ask("nvmlDeviceGetEccMode")
    remapped = ask("nvmlDeviceGetRemappedRows")
    uncorrected = (nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC)
    found = {
        "name": text(nvml.nvmlDeviceGetName(handle)),
        # NVML gives device and vendor in one number, 0x24b010de.
        "id": f"{pci.pciDeviceId & 0xFFFF:04x}:{pci.pciDeviceId >> 16:04x}",
        "bus": text(pci.busId),
        "memory_mib": memory.total // 2**20 if memory else None,
        "persistence": ask("nvmlDeviceGetPersistenceMode"),
        "accounting": ask("nvmlDeviceGetAccountingMode"),
        "compute_mode": ask("nvmlDeviceGetComputeMode"),
        "power_limit_w": watts(ask("nvmlDeviceGetPowerManagementLimit")),
        "power_enforced_w": watts(ask("nvmlDeviceGetEnforcedPowerLimit")),
        "power_default_w": watts(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "temperature_max_c": ask("nvmlDeviceGetTemperatureThreshold", nvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX),
        "ecc": ecc[0] if ecc else None,
        "ecc_pending": ecc[1] if ecc else None,
        "ecc_uncorrected": ask("nvmlDeviceGetTotalEccErrors", *uncorrected) if ecc and ecc[0] else None,
        # Uncorrectable rows that were remapped, a remapping that waits for a reset, one that failed.
        "remapped": list(remapped)[1:] if remapped else None,
        "processes": processes(ask),
    }
    replays = ask("nvmlDeviceGetPcieReplayCounter")
    found["work"] = at_work(nvml, index, ask, found["processes"], client)
    found["replays"] = [replays, ask("nvmlDeviceGetPcieReplayCounter")]
    return found


def watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def at_work(
    nvml: Any, index: int, ask: Question, users: Iterable[dict[str, Any]], client: dict[str, Any]
) -> dict[str, Any]:
    """The card while it works: by those that use it (MPS' own server is none of them), or else by a client of ours.

    `error`: why ours did not work.
    """
    others = [user["name"] for user in users if user["name"] != "nvidia-cuda-mps-server"]
    found: dict[str, Any] = {
        "by": others,
        "error": "",
        "generation": None,
        "width": None,
        "clock_mhz": None,
        "use": None,
        "reasons": 0,
    }
    if others:
        end = time.monotonic() + WORK_S
        while time.monotonic() < end:
            look(nvml, ask, found)
        memory = ask("nvmlDeviceGetMemoryInfo")
        if found["use"] or not client or memory is None or memory.free < ROOM_MIB * 2**20:
            return found
        found["by"] = []
    environment = {**client.get("env", os.environ), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    argv = ["timeout", str(CLIENT_S), sys.executable, "-I", "-c", CLIENT, str(index), str(WORK_S)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(argv, **{**client, "env": environment, **pipes}) as ours:
        assert ours.stdout is not None
        first = ours.stdout.readline()
        while first == "working\n" and ours.poll() is None:
            look(nvml, ask, found)
        rest = (first + ours.stdout.read()).strip().splitlines()
    if ours.returncode == 124:
        found["error"] = f"it was still waiting after {CLIENT_S} s"
    elif ours.returncode != 0:
        found["error"] = rest[-1] if rest else f"exit status {ours.returncode}"
    return found


def look(nvml: Any, ask: Question, found: dict[str, Any]) -> None:
    """One look at the working card: the best of all is kept, and every reason for lower clocks."""
    use = ask("nvmlDeviceGetUtilizationRates")
    values = {
        "generation": ask("nvmlDeviceGetCurrPcieLinkGeneration"),
        "width": ask("nvmlDeviceGetCurrPcieLinkWidth"),
        "clock_mhz": ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_GRAPHICS),
        "use": use.gpu if use is not None else None,
    }
    for key, value in values.items():
        if value is not None:
            found[key] = max(value, found[key] or 0)
    reasons = ask("nvmlDeviceGetCurrentClocksThrottleReasons")
    found["reasons"] = None if reasons is None or found["reasons"] is None else found["reasons"] | reasons
    time.sleep(LOOK_S)


def output(command: list[str]) -> str:
    """What a command prints; empty when it is not there or fails."""
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


if __name__ == "__main__":
    json.dump(observe(json.loads(sys.argv[1])), sys.stdout)

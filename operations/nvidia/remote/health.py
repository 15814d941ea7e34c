# SPDX-License-Identifier: MIT
"""gpulab-health: is the guest's GPU sound? On the guest as a program, and read by a deploy as a fact.

Reads NVML, the kernel's log and the MPS daemon, judges what it found, and names for each finding the command that
helps. It changes nothing. What NVML does not answer is told as not known, it never passes.
"""

import argparse
import contextlib
import ctypes
import glob
import hashlib
import json
import os
import pwd
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from operations.remote.common import answer, run, text

#: Where a deploy puts nvidia-ml-py's module.
LIBRARY = "/usr/local/lib/gpulab"
#: What the card is set to at boot, and what is expected of it beyond that. Either may be absent.
SETTINGS = "/etc/gpulab/gpu.json"
EXPECTED = "/etc/gpulab/health.json"
#: The replay counters of the last run; gone at a boot, as the counters are.
MEMORY = "/run/gpulab/health.json"
#: What the thermal policy has lowered, by the GPU's bus id.
THERMAL = "/run/gpulab/thermal.json"
MPS_UNIT = "/etc/systemd/system/gpulab-mps.service"
MPS_ENVIRONMENT = {"CUDA_MPS_PIPE_DIRECTORY": "/run/nvidia-mps", "CUDA_MPS_LOG_DIRECTORY": "/var/log/nvidia-mps"}
SERVICE_USER = "gpulab-gpu"

#: Seconds of load, and what is copied to the card and back meanwhile.
LOAD_S = 1.0
LOAD_BYTES = 64 * 2**20
#: Free memory that the card must have for that beside others.
ROOM_BYTES = 2**30

#: Numbers of NVML (nvml.h): the errors that have a cause of their own.
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, GPU_IS_LOST, MISMATCH = 9, 12, 15, 18

#: Xids of the card, its memory, its link and its firmware (imbue-ai/cluster-health and Azure's node health checks).
HARDWARE = {
    *(48, 56, 57, 58, *range(62, 66), *range(68, 78), *range(79, 87), 88, 89, 92),
    *(*range(94, 106), *range(110, 121), *range(122, 126)),
}
#: Xids after which the card is of no use before its reset (NVIDIA's Xid catalogue).
NEEDS_RESET = {48, 62, 64, 79, 95, 119, 120}
#: Xids that speak of the program that ran.
APPLICATION = {13, 31, 43, 45}
XIDS = {
    13: "exception of a program's kernel",
    31: "a program's access to memory that is not its own",
    43: "a program's channel was stopped",
    45: "cleanup after a program that was ended",
    48: "double bit ECC error",
    62: "the card's micro-controller halted",
    63: "a row of memory was remapped",
    64: "a row of memory could not be remapped",
    79: "the GPU has fallen off the bus",
    92: "many single bit ECC errors",
    94: "contained ECC error",
    95: "uncontained ECC error",
    119: "the card's firmware (GSP) does not answer",
    120: "error of the card's firmware (GSP)",
}

#: Why the clocks are below what was asked for (nvml.h, clocks event reasons), and whether that is a finding.
REASONS: tuple[tuple[int, str, str | None], ...] = (
    (0x1, "idle", None),
    (0x2, "application clocks", None),
    # The power limit at work: normal under load.
    (0x4, "power limit", None),
    (0x8, "hardware slowdown", "major"),
    (0x10, "sync boost", None),
    (0x20, "software thermal slowdown", "minor"),
    (0x40, "hardware thermal slowdown", "major"),
    (0x80, "external power brake", "major"),
    (0x100, "display clocks", None),
)
COMPUTE_MODES = {0: "DEFAULT", 1: "EXCLUSIVE_THREAD", 2: "PROHIBITED", 3: "EXCLUSIVE_PROCESS"}

#: More replays a minute than NVIDIA's resource manager recommends (DCGM, dcgm_hw_limits: 8).
REPLAYS_A_MINUTE = 8
#: Uncorrectable rows that were remapped, beyond which Azure takes a card out of service.
ROWS = 512
#: MHz by which a locked clock may differ: the card knows steps of 15.
CLOCK_STEP_MHZ = 15

SEVERITIES = ("critical", "major", "minor")
POWER_CYCLE = "stop and start the VM on its node (qm stop, qm start): a reboot of the guest does not reset the card"
DEPLOY = "deploy again (pyinfra … deploy.py)"
SLOT = "`lspci -vv` on the node shows the slot; seat the card anew, in a slot with all lanes"


class Finding(NamedTuple):
    """Something that is not as it should be: `severity` is critical, major or minor."""

    id: str
    severity: str
    what: str
    seen: str
    expected: str
    command: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.what}: {self.seen}, expected {self.expected} [{self.id}]; {self.command}"


# What is read.


def read(files: list[str], load: bool = False) -> dict[str, Any]:
    """`health`: the state to be judged. `files`: digest and mode of each, None where it is absent."""
    return {"files": {path: digest(path) for path in files}, "health": observe(load)}


def digest(path: str) -> list[str | int] | None:
    """SHA-256 and mode of a file."""
    try:
        with open(path, "rb") as file:
            return [hashlib.sha256(file.read()).hexdigest(), stat.S_IMODE(os.fstat(file.fileno()).st_mode)]
    except OSError:
        return None


def observe(load: bool) -> dict[str, Any]:
    """Everything that judge() needs; `load`: also how the card behaves under load."""
    proc = text("/proc/driver/nvidia/version") or ""
    loaded = (text("/sys/module/nvidia/version") or "").strip() or None
    found: dict[str, Any] = {
        "time": time.time(),
        "devices": devices(),
        "loaded": loaded,
        # What says why, if there is no driver or another one.
        "on_disk": None if loaded else run("modinfo", "-F", "version", "nvidia")[1].strip() or None,
        "nouveau": os.path.isdir("/sys/module/nouveau"),
        "library": library_version(),
        "simulated": "simulated" in proc.lower(),
        "log": kernel_log(),
        "settings": from_json(SETTINGS),
        "expected": from_json(EXPECTED) or {},
        "lowered": from_json(THERMAL) or {},
        "before": from_json(MEMORY) or {},
        "mps": mps() if os.path.exists(MPS_UNIT) else None,
        "nvml": None,
        "gpus": [],
    }
    if found["devices"] and loaded:
        found |= nvml_state(load)
    return found


def devices() -> list[str]:
    """Addresses of the NVIDIA display devices on the PCI bus."""
    found = []
    for folder in sorted(glob.glob("/sys/bus/pci/devices/*")):
        vendor, kind = (text(f"{folder}/{name}") or "" for name in ("vendor", "class"))
        if vendor.strip() == "0x10de" and kind.startswith("0x03"):
            found.append(os.path.basename(folder))
    return found


def library_version() -> str | None:
    """The version in the file name of the NVML library that a program would load."""
    cached = re.search(r"libnvidia-ml\.so\.1 .*=> (\S+)", run("/sbin/ldconfig", "-p")[1])
    version = re.search(r"\.so\.([0-9]+(?:\.[0-9]+)+)$", os.path.realpath(cached[1])) if cached else None
    return version[1] if version else None


def from_json(path: str) -> dict[str, Any] | None:
    """A file's JSON object, None when there is none."""
    try:
        value = json.loads(text(path) or "")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def kernel_log() -> list[dict[str, Any]]:
    """The driver's messages since boot: `time` (seconds since the epoch) and `message`.

    The journal keeps them longest; the kernel's own buffer has those of a time before the journal ran.
    """
    found: list[dict[str, Any]] = []
    own = ("_TRANSPORT=kernel", "+", "SYSLOG_IDENTIFIER=kernel")
    shape = ("-o", "json", "--output-fields=MESSAGE", "--no-pager", "-q")
    for line in run("journalctl", "-b", "--grep=NVRM", *shape, *own)[1].splitlines():
        entry = json.loads(line)
        if isinstance(entry.get("MESSAGE"), str):
            found.append({"time": int(entry["__REALTIME_TIMESTAMP"]) / 1e6, "message": entry["MESSAGE"]})
    known = {entry["message"] for entry in found}
    boot = re.search(r"^btime ([0-9]+)$", text("/proc/stat") or "", re.M)
    for line in run("dmesg")[1].splitlines():
        stamp = re.match(r"\[ *([0-9.]+)\] (.*NVRM.*)", line)
        if stamp and boot and stamp[2] not in known:
            found.append({"time": int(boot[1]) + float(stamp[1]), "message": stamp[2]})
    return sorted(found, key=lambda entry: float(entry["time"]))


def mps() -> dict[str, Any]:
    """The MPS control daemon: does it answer, and the limits that it gives to every client."""
    percentage = ask_mps("get_default_active_thread_percentage")
    return {
        "unit": run("systemctl", "is-active", os.path.basename(MPS_UNIT))[1].strip(),
        "answers": percentage[0] == 0,
        "says": percentage[1],
        "percentage": percentage[1] if percentage[0] == 0 else None,
        "memory": ask_mps("get_default_device_pinned_mem_limit 0")[1] if percentage[0] == 0 else None,
    }


def ask_mps(command: str) -> tuple[int, str]:
    """Exit status and answer of the control tool, which waits for ever for a daemon that hangs."""
    try:
        done = subprocess.run(
            ["nvidia-cuda-mps-control"],
            input=f"{command}\n",
            capture_output=True,
            text=True,
            timeout=5,
            env={**os.environ, **MPS_ENVIRONMENT, "LC_ALL": "C"},
        )
    except FileNotFoundError:
        return 127, "nvidia-cuda-mps-control is not installed"
    except subprocess.TimeoutExpired:
        return 124, "no answer in 5 s"
    return done.returncode, (done.stdout + done.stderr).strip()


def nvml_state(load: bool) -> dict[str, Any]:
    """What NVML says: `nvml` (an error, or the driver's version) and `gpus`."""
    sys.path.insert(0, LIBRARY)
    try:
        import pynvml
    except ImportError:
        return {"nvml": {"code": None, "error": f"there is no pynvml.py in {LIBRARY}", "version": None}, "gpus": []}
    finally:
        sys.path.remove(LIBRARY)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"nvml": {"code": error.value, "error": str(error), "version": None}, "gpus": []}
    try:
        version = words(pynvml.nvmlSystemGetDriverVersion())
        gpus = [gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
        for found in gpus:
            found["load"] = under_load(pynvml, found) if load and found["error"] is None else None
        return {"nvml": {"code": 0, "error": None, "version": version}, "gpus": gpus}
    except pynvml.NVMLError as error:
        return {"nvml": {"code": error.value, "error": str(error), "version": None}, "gpus": []}
    finally:
        pynvml.nvmlShutdown()


def words(value: str | bytes) -> str:
    """NVML's strings are bytes in some versions of its module."""
    return value if isinstance(value, str) else value.decode(errors="replace")


class Asker:
    """Asks NVML about one GPU; `unknown` says what it did not answer, and why."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.nvml, self.handle = nvml, handle
        self.unknown: dict[str, str] = {}

    def __call__(self, what: str, question: str, *more: Any) -> Any:
        """The answer, None for one that card, driver or module does not have. A lost GPU is an error."""
        function: Callable[..., Any] | None = getattr(self.nvml, question, None)
        if function is None:
            self.unknown[what] = f"this pynvml has no {question}"
            return None
        try:
            return function(self.handle, *more)
        except self.nvml.NVMLError as error:
            if error.value == GPU_IS_LOST:
                raise
            self.unknown[what] = str(error)
            return None


def gpu(nvml: Any, index: int) -> dict[str, Any]:
    """One GPU; `error` and its `code` when it does not answer at all."""
    try:
        ask = Asker(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
        return {"index": index, "error": None, "code": 0, **reading(nvml, ask), "unknown": ask.unknown}
    except nvml.NVMLError as error:
        return {"index": index, "error": str(error), "code": error.value}


def reading(nvml: Any, ask: Asker) -> dict[str, Any]:
    """Every value of a GPU that tells of its health or its settings, None where it is not known."""
    pci = nvml.nvmlDeviceGetPciInfo(ask.handle)
    ecc = ask("ECC mode", "nvmlDeviceGetEccMode")
    rows = ask("remapped rows", "nvmlDeviceGetRemappedRows")
    limit = ask("power limit", "nvmlDeviceGetPowerManagementLimit")
    default = ask("default power limit", "nvmlDeviceGetPowerManagementDefaultLimit")
    kinds = {"corrected": nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED, "uncorrected": nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED}
    counters = {"volatile": nvml.NVML_VOLATILE_ECC, "aggregate": nvml.NVML_AGGREGATE_ECC}
    thresholds = {
        "slowdown": nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN,
        "full clocks": nvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX,
    }
    return {
        "name": words(nvml.nvmlDeviceGetName(ask.handle)),
        "uuid": words(nvml.nvmlDeviceGetUUID(ask.handle)),
        "bus": words(pci.busId),
        "ecc": {"current": ecc[0], "pending": ecc[1]} if ecc else None,
        # No counters while ECC is off.
        "ecc_errors": {
            f"{name} {kind}": ask(f"{name} {kind} ECC errors", "nvmlDeviceGetTotalEccErrors", number, counter)
            for name, counter in counters.items()
            for kind, number in kinds.items()
        }
        if ecc and ecc[0]
        else None,
        "rows": dict(zip(("corrected", "uncorrected", "pending", "failure"), rows, strict=True)) if rows else None,
        "width": ask("link width", "nvmlDeviceGetCurrPcieLinkWidth"),
        "width_max": ask("greatest link width", "nvmlDeviceGetMaxPcieLinkWidth"),
        "generation": ask("link generation", "nvmlDeviceGetCurrPcieLinkGeneration"),
        "generation_max": ask("greatest link generation", "nvmlDeviceGetMaxPcieLinkGeneration"),
        "reasons": reasons(nvml, ask),
        "replays": ask("replay counter", "nvmlDeviceGetPcieReplayCounter"),
        "persistence": ask("persistence mode", "nvmlDeviceGetPersistenceMode"),
        "accounting": ask("accounting mode", "nvmlDeviceGetAccountingMode"),
        "compute_mode": ask("compute mode", "nvmlDeviceGetComputeMode"),
        "power_limit_w": None if limit is None else limit / 1000,
        "power_default_w": None if default is None else default / 1000,
        "temperature_c": ask("temperature", "nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "thresholds_c": {
            name: ask(f"{name} temperature", "nvmlDeviceGetTemperatureThreshold", number)
            for name, number in thresholds.items()
        },
        "processes": processes(ask),
    }


def reasons(nvml: Any, ask: Asker) -> Any:
    """The event reasons, by the name that they have had since 2023 or by the one before."""
    found = ask("throttle reasons", "nvmlDeviceGetCurrentClocksEventReasons")
    if found is None:
        found = ask("throttle reasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
        if found is not None:
            ask.unknown.pop("throttle reasons", None)
    return found


def processes(ask: Asker) -> list[dict[str, Any]]:
    """Who computes on the GPU: pid, name and user id. MPS' own server is none of them."""
    found = {}
    for kind in ("Compute", "MPSCompute", "Graphics"):
        for process in ask(f"{kind} processes", f"nvmlDeviceGet{kind}RunningProcesses") or []:
            name = os.path.basename((text(f"/proc/{process.pid}/cmdline") or "").partition("\0")[0]) or "unknown"
            try:
                uid = os.stat(f"/proc/{process.pid}").st_uid
            except OSError:
                continue
            if name != "nvidia-cuda-mps-server":
                found[process.pid] = {"pid": process.pid, "name": name, "uid": uid}
    # Not every driver has the other two lists; the first one is enough to leave others alone.
    ask.unknown.pop("MPSCompute processes", None)
    ask.unknown.pop("Graphics processes", None)
    return [found[pid] for pid in sorted(found)]


# Load.


def under_load(nvml: Any, found: Mapping[str, Any]) -> dict[str, Any]:
    """How the link and the clocks are while the card works.

    `by`: who works: `gpulab-health` itself, or the processes that use the card anyway, which are left alone. With MPS,
    those that hold the card and do nothing are no hindrance: one more client is what it is for.
    """
    others = found["processes"]
    load: dict[str, Any] = {"by": "others" if others else "gpulab-health", "error": ""}
    sampler = Sampler(nvml, nvml.nvmlDeviceGetHandleByIndex(found["index"]))
    if others:
        end = time.monotonic() + LOAD_S
        while time.monotonic() < end:
            sampler.sample()
        if sampler.seen["utilisation"] or not has_room(sampler.ask):
            return load | sampler.seen
        load["by"] = "gpulab-health"
    child = start_load(found["index"])
    try:
        assert child.stdout is not None
        line = child.stdout.readline()
        while line == "working\n" and child.poll() is None:
            sampler.sample()
        rest, errors = child.communicate(timeout=20)
        if child.returncode != 0:
            last = (rest + errors).strip().splitlines()[-1:] or [line.strip() or f"exit status {child.returncode}"]
            load["error"] = last[0]
    except subprocess.TimeoutExpired:
        load["error"] = "the load does not come to an end"
    finally:
        child.kill()
        child.wait()
    return load | sampler.seen


def has_room(ask: Asker) -> bool:
    """May a client be started beside others that are at rest?"""
    memory = ask("memory", "nvmlDeviceGetMemoryInfo")
    return os.path.exists(MPS_UNIT) and memory is not None and memory.free >= ROOM_BYTES


class Sampler:
    """The best link, and the fastest clock, of many looks."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self.ask = Asker(nvml, handle)
        self.nvml = nvml
        self.seen: dict[str, Any] = {"samples": 0}

    def sample(self) -> None:
        ask = self.ask
        use = ask("utilisation", "nvmlDeviceGetUtilizationRates")
        self.most("generation", ask("link generation", "nvmlDeviceGetCurrPcieLinkGeneration"))
        self.most("width", ask("link width", "nvmlDeviceGetCurrPcieLinkWidth"))
        self.most("clock_mhz", ask("clock", "nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_GRAPHICS))
        self.most("utilisation", use.gpu if use is not None else None)
        self.seen["reasons"] = self.seen.get("reasons", 0) | (reasons(self.nvml, ask) or 0)
        self.seen["samples"] += 1
        time.sleep(0.05)

    def most(self, key: str, value: int | None) -> None:
        known = [each for each in (self.seen.get(key), value) if each is not None]
        self.seen[key] = max(known) if known else None


def start_load(index: int) -> subprocess.Popen[str]:
    """This program again, as a client of the GPU: with MPS as the one user whose clients it takes."""
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    user = None
    if os.path.exists(MPS_UNIT):
        environment |= MPS_ENVIRONMENT
        if os.geteuid() == 0:
            # Without that user there is no client of MPS: CUDA will say so.
            with contextlib.suppress(KeyError):
                user = pwd.getpwnam(SERVICE_USER)
    # `timeout` ends a client that MPS lets wait.
    return subprocess.Popen(
        ["timeout", "15", sys.executable, "-I", os.path.abspath(__file__), "--make-load", str(index)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        user=user.pw_uid if user else None,
        group=user.pw_gid if user else None,
        extra_groups=[] if user else None,
    )


def make_load(index: int) -> int:
    """Copy to the card and back for a while. Prints `working` once it has begun, or what CUDA says against it."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        print(error)
        return 1

    def call(name: str, *arguments: Any) -> None:
        code = getattr(cuda, name)(*arguments)
        if code:
            word = ctypes.c_char_p()
            cuda.cuGetErrorName(code, ctypes.byref(word))
            raise RuntimeError(f"{name}: {(word.value or b'error').decode()} ({code})")

    device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
    buffer, size = ctypes.create_string_buffer(os.urandom(2**20) * (LOAD_BYTES // 2**20)), ctypes.c_size_t(LOAD_BYTES)
    try:
        call("cuInit", 0)
        call("cuDeviceGet", ctypes.byref(device), index)
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc_v2", ctypes.byref(memory), size)
        print("working", flush=True)
        end = time.monotonic() + LOAD_S
        while time.monotonic() < end:
            call("cuMemcpyHtoD_v2", memory, buffer, size)
            call("cuMemcpyDtoH_v2", buffer, memory, size)
        call("cuMemFree_v2", memory)
        call("cuDevicePrimaryCtxRelease_v2", device)
    except (RuntimeError, AttributeError) as error:
        print(error)
        return 1
    return 0


# What it means.


def judge(state: Mapping[str, Any]) -> list[Finding]:
    """Everything that is not as it should be, worst first. Without a GPU or driver that one thing, with its cause."""
    missing = absent(state)
    if missing is not None:
        return [missing]
    found = xid_findings(state)
    for each in state["gpus"]:
        found += lost(state, each) if each["error"] is not None else gpu_findings(state, each)
    found += mps_findings(state)
    return sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))


def absent(state: Mapping[str, Any]) -> Finding | None:
    """Why there is nothing else to judge: no GPU, no driver, or one that does not answer."""
    if not state["devices"]:
        told = fallen(state)
        cause = f"the kernel log says: {told}" if told else "no NVIDIA display device"
        command = POWER_CYCLE if told else "look at hostpci0 of the VM on its node (qm config), then stop and start it"
        return Finding("gpu.absent", "critical", "no GPU on the guest's PCI bus", cause, "one of vendor 10de", command)
    if state["loaded"] is None:
        if state["on_disk"] is None:
            seen, command = "no module nvidia on disk for this kernel", f"`dkms status`, then {DEPLOY}"
        elif state["nouveau"]:
            seen, command = "nouveau has the card", f"{DEPLOY}, which reboots the guest without nouveau"
        else:
            seen = f"module {state['on_disk']} is on disk"
            command = "`modprobe nvidia; dmesg | grep -i nvrm` says why (Secure Boot? `mokutil --sb-state`)"
        return Finding("driver.absent", "critical", "the NVIDIA driver is not loaded", seen, "a loaded module", command)
    nvml = state["nvml"]
    if nvml["code"] is None:
        return Finding("nvml.module", "major", "NVML can't be read", nvml["error"], "nvidia-ml-py's module", DEPLOY)
    if nvml["error"] is None and not state["gpus"]:
        seen = f"NVML shows none; the PCI bus has {', '.join(state['devices'])}"
        return Finding("gpu.absent", "critical", "the driver has no GPU", seen, "the card", POWER_CYCLE)
    if nvml["error"] is None:
        return None
    if nvml["code"] == MISMATCH:
        seen = f"module {state['loaded']} is loaded, the library is {state['library'] or 'unknown'}"
        what = "driver and library are of different versions"
        return Finding("driver.mismatch", "critical", what, seen, "one version", f"{DEPLOY}: it reloads the module")
    if nvml["code"] == GPU_IS_LOST:
        return lost(state, {"bus": state["devices"][0], **nvml})[0]
    if nvml["code"] == DRIVER_NOT_LOADED:
        seen = f"NVML: {nvml['error']}, though module {state['loaded']} is loaded"
        command = "`nvidia-smi`, `ls /dev/nvidia*` and `dmesg | grep -i nvrm` say why"
        return Finding("driver.absent", "critical", "the driver does not answer", seen, "an answer", command)
    if nvml["code"] == LIBRARY_NOT_FOUND:
        what = "the driver's user space is not installed"
        return Finding("driver.library", "critical", what, str(nvml["error"]), "libnvidia-ml.so.1", DEPLOY)
    command = "`nvidia-smi` and `dmesg | grep -i nvrm` say more"
    return Finding("nvml.error", "critical", "NVML does not answer", str(nvml["error"]), "an answer", command)


def fallen(state: Mapping[str, Any]) -> str:
    """The kernel's last word of a GPU that is gone, empty when there is none."""
    said = [
        entry["message"] for entry in state["log"] if re.search(r"fallen off the bus|GPU is lost", entry["message"])
    ]
    return said[-1].strip() if said else ""


def lost(state: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    """A GPU that does not answer any more."""
    where = gpu.get("bus") or f"GPU {gpu.get('index')}"
    told = fallen(state)
    seen = f"NVML: {gpu['error']}" + (f"; the kernel log says: {told}" if told else "")
    if gpu["code"] == GPU_IS_LOST:
        return [Finding("gpu.lost", "critical", f"{where} is lost", seen, "an answer", POWER_CYCLE)]
    command = "`nvidia-smi` and `dmesg | grep -i nvrm` say more"
    return [Finding("gpu.error", "critical", f"{where} does not answer", seen, "an answer", command)]


def xids(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Xid errors of the kernel log: number, `time`, `pid` and `name` of the process where it is told, `message`."""
    found = []
    for entry in log:
        line = re.search(r"NVRM: Xid \(([^)]*)\): ([0-9]+), ?(.*)", entry["message"])
        if line is None:
            continue
        pid = re.search(r"pid='?([0-9]+)", line[3])
        name = re.search(r"name='?([^\s,'<>]+)", line[3])
        found.append(
            {
                "number": int(line[2]),
                "device": line[1],
                "time": entry["time"],
                "pid": int(pid[1]) if pid else None,
                "name": name[1] if name else None,
                "message": line[3],
            }
        )
    return found


def xid_findings(state: Mapping[str, Any]) -> list[Finding]:
    """One finding for each number."""
    seen: dict[int, list[dict[str, Any]]] = {}
    for xid in xids(state["log"]):
        seen.setdefault(xid["number"], []).append(xid)
    return [xid_finding(number, entries) for number, entries in sorted(seen.items())]


def xid_finding(number: int, entries: list[dict[str, Any]]) -> Finding:
    last = entries[-1]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(last["time"]))
    who = f", process {last['pid']} ({last['name'] or 'unknown'})" if last["pid"] else ""
    times = "once" if len(entries) == 1 else f"{len(entries)} times, the last"
    what = f"Xid {number} ({XIDS.get(number, 'see the Xid catalogue')}) of {last['device']}"
    if number in APPLICATION:
        command = "look at the program's own log: the card is not at fault"
        return Finding("xid.application", "minor", what, f"{times} at {when}{who}", "none since boot", command)
    severity = "critical" if number in NEEDS_RESET else "major"
    name = "xid.hardware" if number in HARDWARE else "xid.other"
    command = f"{POWER_CYCLE}; if it comes back, the card, its slot or its power is at fault"
    return Finding(name, severity, what, f"{times} at {when}{who}", "none since boot", command)


def gpu_findings(state: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    """Everything about one GPU that answers."""
    return [
        *memory_findings(gpu),
        *link_findings(state, gpu),
        *throttle_findings(gpu),
        *replay_findings(state, gpu),
        *temperature_findings(gpu),
        *settings_findings(state, gpu),
        *unknown_findings(gpu),
    ]


def memory_findings(gpu: Mapping[str, Any]) -> list[Finding]:
    """ECC errors and remapped rows."""
    where, found = gpu["bus"], []
    errors = gpu["ecc_errors"] or {}
    if errors.get("volatile uncorrected"):
        what = f"uncorrected ECC errors of {where}"
        seen = f"{errors['volatile uncorrected']} since the driver was loaded"
        found.append(Finding("ecc.uncorrected", "major", what, seen, "0", POWER_CYCLE))
    elif errors.get("aggregate uncorrected"):
        what = f"uncorrected ECC errors of {where}"
        seen = f"{errors['aggregate uncorrected']} in the card's life, none since the driver was loaded"
        command = "watch it; `nvidia-smi -q -d ECC,ROW_REMAPPER` shows where they are"
        found.append(Finding("ecc.aggregate", "minor", what, seen, "0", command))
    rows = gpu["rows"] or {}
    if rows.get("failure"):
        what = f"a row of {where} could not be remapped"
        seen = f"failure, {rows['uncorrected']} uncorrectable rows"
        found.append(Finding("rows.failure", "critical", what, seen, "no failure", "replace the card"))
    if rows.get("pending"):
        what = f"a remapped row of {where} waits for a reset"
        found.append(Finding("rows.pending", "major", what, "pending", "none pending", POWER_CYCLE))
    if rows.get("uncorrected") and not rows.get("failure"):
        many = rows["uncorrected"] > ROWS
        command = "replace the card" if many else "watch it; `nvidia-smi -q -d ROW_REMAPPER`"
        what = f"rows of {where} were remapped for uncorrectable errors"
        severity = "major" if many else "minor"
        found.append(Finding("rows.uncorrectable", severity, what, str(rows["uncorrected"]), "0", command))
    return found


def link_findings(state: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    """The link's width, which never changes, and its generation under load: at rest it falls to save power."""
    where, load, found = gpu["bus"], gpu.get("load"), []
    width, least = gpu["width"], state["expected"].get("link_width") or gpu["width_max"]
    if width is not None and least is not None and width < least:
        what = f"the PCIe link of {where} is narrow"
        found.append(Finding("link.width", "major", what, f"x{width}", f"x{least}", SLOT))
    if load is None:
        return found
    if load["error"]:
        what, seen = f"no load could be made on {where}", load["error"]
        command = "`dmesg | grep -i nvrm`, and `systemctl status gpulab-mps` where MPS is on"
        return [*found, Finding("load", "major", what, seen, "a second of copies", command)]
    generation, least = load.get("generation"), state["expected"].get("link_generation") or gpu["generation_max"]
    if generation is None or least is None or generation >= least:
        return found
    if load["by"] == "others" and not load.get("utilisation"):
        return found
    what = f"the PCIe link of {where} is slow under load"
    return [
        *found,
        Finding("link.generation", "major", what, f"generation {generation}", f"generation {least}", SLOT),
    ]


def reason_words(bits: int) -> list[str]:
    """The event reasons in words."""
    known = [word for bit, word, _ in REASONS if bits & bit]
    rest = bits & ~sum(bit for bit, _, _ in REASONS)
    return [*known, *([f"unknown ({rest:#x})"] if rest else [])]


def throttle_findings(gpu: Mapping[str, Any]) -> list[Finding]:
    """What slows the card down, other than rest and its power limit."""
    load = gpu.get("load") or {}
    bits = (gpu["reasons"] or 0) | (load.get("reasons") or 0)
    bad = [(word, severity) for bit, word, severity in REASONS if bits & bit and severity is not None]
    if not bad:
        return []
    severity = min((severity for _, severity in bad), key=SEVERITIES.index)
    what, seen = f"{gpu['bus']} is slowed down", ", ".join(word for word, _ in bad)
    command = "the card's fan, its air and its power cable; `nvidia-smi -q -d PERFORMANCE,TEMPERATURE`"
    return [Finding("throttle", severity, what, seen, "at most idle or power limit", command)]


def replay_findings(state: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    """Packets that the link sent again: not their number since boot, their growth between two runs."""
    replays, before = gpu["replays"], state["before"].get(gpu["uuid"])
    if replays is None or before is None or replays <= before["replays"]:
        return []
    minutes = max(state["time"] - before["time"], 1) / 60
    growth = replays - before["replays"]
    rate = growth / max(minutes, 1)
    seen = f"{growth} more in {minutes:.1f} min"
    severity = "major" if rate > REPLAYS_A_MINUTE else "minor"
    what = f"the PCIe link of {gpu['bus']} sends packets again"
    return [Finding("link.replay", severity, what, seen, "no growth", SLOT)]


def temperature_findings(gpu: Mapping[str, Any]) -> list[Finding]:
    """The temperature against the card's own thresholds."""
    temperature, limits = gpu["temperature_c"], gpu["thresholds_c"]
    for name, severity in (("slowdown", "critical"), ("full clocks", "major")):
        limit = limits.get(name)
        if temperature is not None and limit is not None and temperature >= limit:
            what, command = f"{gpu['bus']} is hot", "the card's fan and its air; `nvidia-smi -q -d TEMPERATURE`"
            expected = f"below {limit} °C, its limit for {name}"
            return [Finding("temperature", severity, what, f"{temperature} °C", expected, command)]
    return []


def settings_findings(state: Mapping[str, Any], gpu: Mapping[str, Any]) -> list[Finding]:
    """What the card is set to, against what a deploy declared; without that, only what is never right."""
    settings, where, found = state["settings"], gpu["bus"], []
    command = "`systemctl restart gpulab-gpu-settings`"
    if settings is None:
        if gpu["persistence"] == 0:
            what, seen = f"persistence mode of {where}", "off: settings are lost with the last client"
            found.append(Finding("persistence", "minor", what, seen, "on", DEPLOY))
        return found
    for key in ("persistence", "accounting"):
        if settings.get(key) is not None and gpu[key] is not None and bool(gpu[key]) != bool(settings[key]):
            severity = "major" if key == "persistence" else "minor"
            what = f"{key} mode of {where}"
            found.append(Finding(key, severity, what, on_off(gpu[key]), on_off(settings[key]), command))
    wanted = settings.get("power_limit_w") or gpu["power_default_w"]
    if wanted is not None and gpu["power_limit_w"] is not None and abs(gpu["power_limit_w"] - wanted) >= 1:
        thermal = state["lowered"].get(where, {}).get("limit_mw") == gpu["power_limit_w"] * 1000
        what, seen = f"power limit of {where}", f"{gpu['power_limit_w']:.0f} W"
        # The policy raises it again by itself.
        severity = "minor" if thermal else "major"
        help_ = "the thermal policy lowered it: `journalctl -u gpulab-gpu-thermal`" if thermal else command
        found.append(Finding("power_limit", severity, what, seen, f"{wanted:.0f} W", help_))
    mode = mode_name(settings.get("compute_mode"))
    if mode is not None and gpu["compute_mode"] is not None and mode_name(gpu["compute_mode"]) != mode:
        seen, what = mode_name(gpu["compute_mode"]) or "", f"compute mode of {where}"
        found.append(Finding("compute_mode", "major", what, seen, mode, command))
    ecc = settings.get("ecc")
    if ecc is not None and gpu["ecc"] is not None and bool(gpu["ecc"]["current"]) != bool(ecc):
        waits = bool(gpu["ecc"]["pending"]) == bool(ecc)
        help_ = "reboot the guest: ECC changes at the next start of the card" if waits else command
        found.append(Finding("ecc.mode", "major", f"ECC of {where}", on_off(gpu["ecc"]["current"]), on_off(ecc), help_))
    return found + clock_findings(settings.get("clocks"), gpu, command)


def clock_findings(wanted: list[int] | None, gpu: Mapping[str, Any], command: str) -> list[Finding]:
    """Locked clocks can't be read back, only seen at work."""
    clock = (gpu.get("load") or {}).get("clock_mhz")
    if not wanted or clock is None or clock <= wanted[1] + CLOCK_STEP_MHZ:
        return []
    what, expected = f"graphics clock of {gpu['bus']} under load", f"at most {wanted[1]} MHz"
    return [Finding("clocks", "major", what, f"{clock} MHz", expected, command)]


def on_off(value: Any) -> str:
    return "on" if value else "off"


def mode_name(mode: int | str | None) -> str | None:
    """A compute mode as NVIDIA writes it, from its number or its name."""
    return COMPUTE_MODES.get(mode, str(mode)) if isinstance(mode, int) else mode


def unknown_findings(gpu: Mapping[str, Any]) -> list[Finding]:
    """What NVML did not answer: not known is not sound."""
    if not gpu["unknown"]:
        return []
    seen = ", ".join(f"{what} ({why})" for what, why in gpu["unknown"].items())
    what = f"not known of {gpu['bus']}"
    command = "`nvidia-smi -q` shows what card and driver answer"
    return [Finding("unknown", "minor", what, seen, "an answer", command)]


def mps_findings(state: Mapping[str, Any]) -> list[Finding]:
    """The MPS daemon, where one is installed, and its limits."""
    mps, wanted = state["mps"], state["expected"].get("mps")
    if mps is None:
        return []
    restart = "`systemctl restart gpulab-mps`; `journalctl -u gpulab-mps` says why"
    if not mps["answers"]:
        seen = f"{mps['says'] or 'nothing'} (unit {mps['unit'] or 'unknown'})"
        return [Finding("mps.daemon", "major", "the MPS daemon does not answer", seen, "an answer", restart)]
    if wanted is None:
        return []
    found = []
    percentage = wanted["active_thread_percentage"]
    if number(mps["percentage"]) != percentage:
        what = "MPS' active thread percentage"
        found.append(Finding("mps.limits", "major", what, str(mps["percentage"]), str(percentage), restart))
    memory = wanted["pinned_memory_limit_mib"]
    if not same_memory(mps["memory"], memory):
        what, expected = "MPS' limit of pinned device memory", f"{memory} MiB" if memory is not None else "none"
        found.append(Finding("mps.limits", "major", what, mps["memory"] or "none", expected, restart))
    return found


def number(words: str | None) -> float | None:
    try:
        return float(words or "")
    except ValueError:
        return None


def same_memory(told: str, wanted: int | None) -> bool:
    """Does the daemon mean that many MiB? It tells 1 GiB and more in whole GiB, rounded down; no limit by nothing."""
    size = re.fullmatch(r"([0-9]+)([MG])", told)
    if wanted is None or size is None:
        return wanted is None and not told
    return int(size[1]) == (wanted if size[2] == "M" else wanted // 1024)


def summary(state: Mapping[str, Any]) -> str:
    """What a healthy guest has, in one line."""
    cards = ", ".join(
        f"{gpu['name']} at {gpu['bus']}: {gpu['temperature_c']} °C, link x{gpu['width']} "
        + (under_load_words(gpu) if gpu.get("load") else "(its generation is judged with --load)")
        for gpu in state["gpus"]
    )
    return f"healthy: driver {state['loaded']}, {cards}" + (" [simulated]" if state["simulated"] else "")


def under_load_words(gpu: Mapping[str, Any]) -> str:
    """How the link was under load, or why that is not known."""
    load = gpu["load"]
    if load["by"] == "others":
        names = ", ".join(f"{each['name']} ({each['pid']})" for each in gpu["processes"])
        if not load.get("utilisation"):
            return f"(its generation is not known: {names} hold the card and do nothing)"
        return f"generation {load['generation']} under the load of {names}"
    return f"generation {load['generation']} under load"


def remember(state: Mapping[str, Any]) -> None:
    """Keep the replay counters for the next run's comparison."""
    counters = {
        gpu["uuid"]: {"replays": gpu["replays"], "time": state["time"]}
        for gpu in state["gpus"]
        if gpu["error"] is None and gpu["replays"] is not None
    }
    try:
        os.makedirs(os.path.dirname(MEMORY), exist_ok=True)
        with open(MEMORY + ".new", "w") as file:
            json.dump(counters, file)
        os.rename(MEMORY + ".new", MEMORY)
    except OSError:
        # Not root: the next run compares with the last that was.
        pass


def main(arguments: list[str]) -> int:
    """The program. A deploy's fact gives JSON in place of options."""
    if arguments[:1] and arguments[0].startswith("{"):
        answer(read)
        return 0
    parser = argparse.ArgumentParser(
        prog="gpulab-health",
        description="Is this guest's GPU sound? One line for each finding, worst first.",
        epilog="exit status: 0 healthy, 1 minor findings, 2 major ones, 3 critical ones, 64 wrong usage",
    )
    parser.add_argument("--json", action="store_true", help="findings and all that was read, as JSON")
    parser.add_argument(
        "--load",
        action="store_true",
        help="judge the link under load: that of the processes that use the card, or a second of copies",
    )
    parser.add_argument("--make-load", type=int, metavar="INDEX", help=argparse.SUPPRESS)
    try:
        options = parser.parse_args(arguments)
    except SystemExit as end:
        # 2 means major findings here.
        return 64 if end.code else 0
    if options.make_load is not None:
        return make_load(options.make_load)
    found = observe(options.load)
    findings = judge(found)
    remember(found)
    status = max((len(SEVERITIES) - SEVERITIES.index(finding.severity) for finding in findings), default=0)
    if options.json:
        print(json.dumps({"status": status, "findings": [each._asdict() for each in findings], "state": found}))
    else:
        simulated = " [simulated]" if found["simulated"] else ""
        print("\n".join(f"{finding}{simulated}" for finding in findings) or summary(found))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

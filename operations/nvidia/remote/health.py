# SPDX-License-Identifier: MIT
"""Runs on the guest: everything that tells of the GPU's health, from NVML, the kernel's log and the MPS daemon.

It changes nothing. gpulab_health.py judges what is read here.
"""

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
from typing import Any

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

#: NVML's number of that error (nvml.h).
GPU_IS_LOST = 15


def read(files: list[str]) -> dict[str, Any]:
    """`health`: the state to be judged. `files`: digest and mode of each, None where it is absent."""
    return {"files": {path: digest(path) for path in files}, "health": observe(load=False)}


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


if __name__ == "__main__":
    answer(read)

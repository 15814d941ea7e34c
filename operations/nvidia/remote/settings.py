# SPDX-License-Identifier: MIT
"""What the card is set to: with an argument it prints the guest's state, without one it makes the card as declared.

It is sent by the deploy to read, and installed for gpulab-gpu-settings.service, which sets the card at each boot.
The pure functions are used on both sides: what the deploy takes for wrong is what the unit mends.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from operations.remote.common import answer, files, text, units

SETTINGS = "/etc/gpulab/gpu.json"
#: The clocks that were locked, and in which load of the module: NVML has no question for a lock.
LOCKED = "/run/gpulab/gpu-locked.json"
#: What the thermal policy has lowered, see remote/thermal.py.
THERMAL = "/run/gpulab/thermal.json"
LIBRARY = "/usr/local/lib/gpulab"
MODULE = "/sys/module/nvidia"
MODES = {0: "DEFAULT", 1: "EXCLUSIVE_THREAD", 2: "PROHIBITED", 3: "EXCLUSIVE_PROCESS"}
#: The card rounds a lock to its own steps, MHz.
STEP_MHZ = 15
#: Seconds that a running clock may take to follow a lock.
SETTLE_S = 3.0

Values = dict[str, Any]


def refused(gpu: Values, declared: Values) -> list[str]:
    """What this card cannot do, by its own word: card, value, range."""
    who, problems = f"{gpu['name']} ({gpu['bus']})", []
    watts, span = declared["power_limit_w"], gpu["power_range_mw"]
    if watts is not None and span is None:
        problems.append(f"{who}: power_limit_w = {watts}: it takes no power limit")
    elif watts is not None and not span[0] <= watts * 1000 <= span[1]:
        problems.append(f"{who}: power_limit_w = {watts}: expected {span[0] // 1000} to {span[1] // 1000} W")
    clocks, top = declared["clocks"], gpu["clock_max_mhz"]
    if clocks is not None and top is not None and clocks[1] > top:
        problems.append(f"{who}: clocks = {clocks[0]} to {clocks[1]} MHz: expected at most {top} MHz")
    if declared["ecc"] and gpu["ecc"] is None:
        problems.append(f"{who}: ecc = true: it has none")
    return problems


def differing(gpu: Values, declared: Values, locked: Any, lowered_mw: int | None) -> dict[str, tuple[str, str]]:
    """What is not as declared: subject to (seen, wanted). ECC by what is pending, as only a reboot brings it.

    + locked: the clocks that the unit locked since the module was loaded, None: none
    + lowered_mw: the limit that the thermal policy has set; while it is in force it is no difference
    """
    found: dict[str, tuple[Any, Any]] = {"persistence mode": (_on(gpu["persistence"]), _on(declared["persistence"]))}
    if gpu["accounting"] is not None:
        found["accounting mode"] = (_on(gpu["accounting"]), _on(declared["accounting"]))
    wanted_mw = wanted_limit(gpu, declared)
    by_policy = lowered_mw is not None and gpu["power_limit_mw"] == lowered_mw
    if wanted_mw is not None and not (by_policy and gpu["power_limit_mw"] < wanted_mw):
        found["power limit"] = (watts(gpu["power_limit_mw"]), watts(wanted_mw))
    found["graphics clock"] = (_lock(locked), _lock(declared["clocks"]))
    if declared["clocks"] is not None and (gpu["clock_mhz"] or 0) > declared["clocks"][1] + STEP_MHZ:
        # Somebody has taken the lock away.
        found["graphics clock"] = (f"{gpu['clock_mhz']} MHz", _lock(declared["clocks"]))
    if declared["ecc"] is not None and gpu["ecc"] is not None:
        found["ECC"] = (_on(gpu["ecc"][1]), _on(declared["ecc"]))
    found["compute mode"] = (MODES.get(gpu["compute_mode"], "unknown"), declared["compute_mode"])
    return {subject: (seen, wanted) for subject, (seen, wanted) in found.items() if seen != wanted}


def wanted_limit(gpu: Values, declared: Values) -> int | None:
    """The declared limit, or the card's own default; mW. None: the card takes none."""
    default: int | None = gpu["power_default_mw"]
    return default if declared["power_limit_w"] is None or default is None else declared["power_limit_w"] * 1000


def watts(milliwatts: int | None) -> str:
    return "unknown" if milliwatts is None else f"{milliwatts / 1000:g} W"


def _on(value: Any) -> str:
    return "on" if value else "off"


def _lock(clocks: Any) -> str:
    return "unlocked" if clocks is None else f"{clocks[0]} to {clocks[1]} MHz"


def library() -> Any:
    """nvidia-ml-py as the deploy has put it here."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, LIBRARY)
    import pynvml

    return pynvml


def values(nvml: Any, index: int) -> Values:
    """One GPU's settings in force. None for what it or its driver does not answer."""
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(question: Callable[..., Any], *more: Any) -> Any:
        try:
            return question(handle, *more)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
            return None

    ecc, span = ask(nvml.nvmlDeviceGetEccMode), ask(nvml.nvmlDeviceGetPowerManagementLimitConstraints)
    return {
        "name": string(nvml.nvmlDeviceGetName(handle)),
        "bus": string(nvml.nvmlDeviceGetPciInfo(handle).busId),
        "persistence": ask(nvml.nvmlDeviceGetPersistenceMode),
        "accounting": ask(nvml.nvmlDeviceGetAccountingMode),
        "power_limit_mw": ask(nvml.nvmlDeviceGetPowerManagementLimit),
        "power_default_mw": ask(nvml.nvmlDeviceGetPowerManagementDefaultLimit),
        "power_range_mw": None if span is None else list(span),
        "clock_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_GRAPHICS),
        "clock_max_mhz": ask(nvml.nvmlDeviceGetMaxClockInfo, nvml.NVML_CLOCK_GRAPHICS),
        "ecc": None if ecc is None else list(ecc),
        "compute_mode": ask(nvml.nvmlDeviceGetComputeMode),
    }


def string(value: str | bytes) -> str:
    """NVML's strings are bytes in some versions of its module."""
    return value if isinstance(value, str) else value.decode(errors="replace")


def of_all(nvml: Any) -> list[Values]:
    return [values(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]


def lowered(bus: str) -> int | None:
    """The limit in mW that the thermal policy has set for a card, None: it has lowered nothing."""
    limit: int | None = _json(THERMAL).get(bus, {}).get("limit_mw")
    return limit


def locked() -> Any:
    """The clocks that were locked since the module was loaded."""
    noted = _json(LOCKED)
    return noted.get("clocks") if noted.get("module") == load() else None


def load() -> int:
    """A number that is another one for each load of the module; 0: it is not loaded."""
    try:
        return os.stat(MODULE).st_ino
    except OSError:
        return 0


def _json(path: str) -> dict[str, Any]:
    try:
        found = json.loads(text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def digest(path: str) -> str:
    """SHA-256 of a file, empty: there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return ""


def read(paths: list[str], unit_names: list[str]) -> dict[str, Any]:
    """The files, the units, and what each card is set to; `error` says why NVML has no answer."""
    found: dict[str, Any] = {
        "files": files(paths),
        "library": digest(f"{LIBRARY}/pynvml.py"),
        "units": units(unit_names),
        "boot_id": (text("/proc/sys/kernel/random/boot_id") or "").strip(),
        "error": "",
        "gpus": [],
        "locked": locked(),
    }
    try:
        nvml = library()
    except ImportError as error:
        return {**found, "error": str(error)}
    try:
        nvml.nvmlInit()
        try:
            found["gpus"] = [{**gpu, "lowered_mw": lowered(gpu["bus"])} for gpu in of_all(nvml)]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        found |= {"error": str(error), "gpus": []}
    return found


def put(nvml: Any, handle: Any, gpu: Values, declared: Values, subject: str) -> None:
    """Set one subject of `differing`."""
    if subject == "persistence mode":
        nvml.nvmlDeviceSetPersistenceMode(handle, int(declared["persistence"]))
    elif subject == "accounting mode":
        nvml.nvmlDeviceSetAccountingMode(handle, int(declared["accounting"]))
    elif subject == "power limit":
        nvml.nvmlDeviceSetPowerManagementLimit(handle, wanted_limit(gpu, declared))
    elif subject == "graphics clock" and declared["clocks"] is None:
        nvml.nvmlDeviceResetGpuLockedClocks(handle)
    elif subject == "graphics clock":
        nvml.nvmlDeviceSetGpuLockedClocks(handle, *declared["clocks"])
    elif subject == "ECC":
        nvml.nvmlDeviceSetEccMode(handle, int(declared["ecc"]))
    elif subject == "compute mode":
        mode = next(number for number, name in MODES.items() if name == declared["compute_mode"])
        nvml.nvmlDeviceSetComputeMode(handle, mode)


def apply(nvml: Any, declared: Values) -> list[str]:
    """Set every card as declared and read it back; what is wrong. Nothing is set when a card refuses anything."""
    gpus = of_all(nvml)
    problems = [problem for gpu in gpus for problem in refused(gpu, declared)]
    if problems or not gpus:
        return problems or ["NVML knows no GPU"]
    clocks = locked()
    for index, gpu in enumerate(gpus):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        for subject, (seen, wanted) in differing(gpu, declared, clocks, lowered(gpu["bus"])).items():
            try:
                put(nvml, handle, gpu, declared, subject)
            except nvml.NVMLError as error:
                problems.append(f"{gpu['name']} ({gpu['bus']}): {subject} {wanted}: {error}")
            else:
                print(f"{gpu['name']} ({gpu['bus']}): {subject}: {seen} -> {wanted}")
    if not problems:
        note(declared["clocks"])
        deadline = time.monotonic() + SETTLE_S
        while (problems := unlike(nvml, declared)) and time.monotonic() < deadline:
            time.sleep(0.1)
    return problems


def unlike(nvml: Any, declared: Values) -> list[str]:
    """What reads otherwise than it was asked for."""
    return [
        f"{gpu['name']} ({gpu['bus']}): {subject}: asked for {wanted}, reads {seen}"
        for gpu in of_all(nvml)
        for subject, (seen, wanted) in differing(gpu, declared, locked(), lowered(gpu["bus"])).items()
    ]


def note(clocks: Any) -> None:
    """Remember what the clocks were locked to."""
    os.makedirs(os.path.dirname(LOCKED), exist_ok=True)
    with open(LOCKED, "w") as file:
        json.dump({"clocks": clocks, "module": load()}, file)


def main() -> int:
    nvml = library()
    try:
        nvml.nvmlInit()
        problems = apply(nvml, json.loads(text(SETTINGS) or ""))
    except nvml.NVMLError as error:
        problems = [f"NVML: {error}"]
    except ValueError as error:
        problems = [f"{SETTINGS}: {error}"]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(read)
    else:
        sys.exit(main())

# SPDX-License-Identifier: MIT
"""The thermal policy: with an argument it prints the guest's state, without one it watches the card's temperature.

Installed for gpulab-gpu-thermal.service. At the critical temperature the power limit goes down step by step, and up
again once the card has cooled; each action is a line of the journal. NVML is closed between two looks, so that the
driver's module can be replaced.
"""

import contextlib
import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

from operations.remote.common import answer, files, text, units

SETTINGS = "/etc/gpulab/gpu.json"
POLICY = "/etc/gpulab/thermal.json"
#: What is lowered now, by bus address: the settings' own check must not take it for a mistake.
STATE = "/run/gpulab/thermal.json"
LIBRARY = "/usr/local/lib/gpulab"

#: What was last said of a card.
NORMAL, WARNING, CRITICAL, LOWEST = "normal", "warning", "critical", "lowest"


@dataclass(frozen=True)
class Decision:
    """What is done at one look. `limit`: the new power limit in mW, None: it stays; `log`: empty: nothing is said."""

    limit: int | None
    log: str
    level: str


def decide(
    temperature: int, limit: int, declared: int, span: tuple[int, int], policy: dict[str, Any], level: str
) -> Decision:
    """One look. Limits are in mW.

    + limit: the one in force
    + declared: the one that holds for a cool card
    + span: the lowest and highest that the card takes
    + level: what was last said of this card
    """
    floor, ceiling = span[0], max(span[0], min(declared, span[1]))
    step, calm = policy["step_w"] * 1000, policy["warning_c"] - policy["hysteresis_c"]
    if temperature >= policy["critical_c"]:
        if policy["action"] != "lower-power":
            said = "" if level == CRITICAL else f"{temperature} °C, critical from {policy['critical_c']} °C"
            return Decision(None, said, CRITICAL)
        lower = max(floor, min(limit, ceiling) - step)
        if lower < limit:
            return Decision(
                lower, f"{temperature} °C, critical: power limit {_watts(limit)} -> {_watts(lower)}", CRITICAL
            )
        said = f"{temperature} °C, critical, and the power limit is the card's lowest, {_watts(limit)}"
        return Decision(None, "" if level == LOWEST else said, LOWEST)
    if temperature <= calm:
        higher = min(ceiling, max(floor, limit + step))
        if higher > limit:
            said = f"{temperature} °C, cooled down: power limit {_watts(limit)} -> {_watts(higher)}"
            return Decision(higher, said, NORMAL)
        return Decision(None, "" if level == NORMAL else f"{temperature} °C, cooled down", NORMAL)
    if temperature >= policy["warning_c"] and level == NORMAL:
        return Decision(None, f"{temperature} °C, warning from {policy['warning_c']} °C", WARNING)
    return Decision(None, "", level)


def _watts(milliwatts: int) -> str:
    return f"{milliwatts / 1000:g} W"


def library() -> Any:
    """nvidia-ml-py as the deploy has put it here."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, LIBRARY)
    import pynvml

    return pynvml


def cards(nvml: Any) -> list[tuple[str, Any]]:
    """Bus address and handle of each GPU."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    return [(_string(nvml.nvmlDeviceGetPciInfo(handle).busId), handle) for handle in handles]


def _string(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def declared_limit(nvml: Any, handle: Any) -> int:
    """The limit of the settings' file, or the card's own default; mW."""
    watts = json.loads(text(SETTINGS) or "{}").get("power_limit_w")
    default: int = nvml.nvmlDeviceGetPowerManagementDefaultLimit(handle)
    return default if watts is None else watts * 1000


def look(nvml: Any, policy: dict[str, Any], levels: dict[str, str], lowered: dict[str, Any]) -> None:
    """One look at each card.

    + levels: what was last said of each, and is said now
    + lowered: the limits below the declared one that are this program's doing, as `note` keeps them
    """
    for bus, handle in cards(nvml):
        declared, limit = declared_limit(nvml, handle), nvml.nvmlDeviceGetPowerManagementLimit(handle)
        low, high = nvml.nvmlDeviceGetPowerManagementLimitConstraints(handle)
        temperature = nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        decision = decide(temperature, limit, declared, (low, high), policy, levels.get(bus, NORMAL))
        levels[bus] = decision.level
        if decision.log:
            print(f"{bus}: {decision.log}", flush=True)
        if decision.limit is not None:
            # Noted before it is set: a deploy that reads between the two must not take it for a mistake.
            lowered[bus] = {"limit_mw": decision.limit}
            note(lowered)
            nvml.nvmlDeviceSetPowerManagementLimit(handle, decision.limit)
        if lowered.get(bus, {}).get("limit_mw", declared) >= declared:
            lowered.pop(bus, None)
    note(lowered)


def note(lowered: dict[str, Any]) -> None:
    """What is lowered, whole or not at all."""
    os.makedirs(os.path.dirname(STATE), exist_ok=True)
    with open(f"{STATE}.new", "w") as file:
        json.dump(lowered, file)
    os.rename(f"{STATE}.new", STATE)


def restore(nvml: Any) -> None:
    """Give each card its declared limit back; nobody would raise it again."""
    for bus, handle in cards(nvml):
        declared, limit = declared_limit(nvml, handle), nvml.nvmlDeviceGetPowerManagementLimit(handle)
        if limit < declared:
            nvml.nvmlDeviceSetPowerManagementLimit(handle, declared)
            print(f"{bus}: the policy ends: power limit {_watts(limit)} -> {_watts(declared)}", flush=True)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(STATE)


def watch() -> int:
    """Look until a signal says otherwise."""
    nvml, ended, policy = library(), threading.Event(), json.loads(text(POLICY) or "{}")
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    levels: dict[str, str] = {}
    # One that was killed left its word behind.
    lowered = json.loads(text(STATE) or "{}")
    said = ""
    while not ended.is_set():
        try:
            nvml.nvmlInit()
            try:
                look(nvml, policy, levels, lowered)
            finally:
                nvml.nvmlShutdown()
            said = ""
        except nvml.NVMLError as error:
            # The driver may be about to be replaced; a card that stays away is said once.
            if said != str(error):
                print(f"NVML: {error}", file=sys.stderr, flush=True)
            said = str(error)
        ended.wait(policy["interval_s"])
    try:
        nvml.nvmlInit()
        restore(nvml)
    except nvml.NVMLError as error:
        print(f"NVML: {error}", file=sys.stderr)
        return 1
    return 0


def read(paths: list[str], unit: str) -> dict[str, Any]:
    """The files and the unit."""
    return {"files": files(paths), "unit": units([unit])[unit]}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        answer(read)
    else:
        sys.exit(watch())

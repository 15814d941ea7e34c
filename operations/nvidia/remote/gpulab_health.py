# SPDX-License-Identifier: MIT
"""gpulab-health: is the guest's GPU sound? Judges what health.py reads, and names what helps for each finding.

It stands on the guest as a program; a deploy judges with it, too. What NVML does not answer is told as not known, it
never passes.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from operations.nvidia.remote.health import GPU_IS_LOST, MEMORY, make_load, observe
from operations.remote.common import same_memory

#: Other errors of NVML that have a cause of their own (nvml.h).
DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, MISMATCH = 9, 12, 18

#: Xids of the card, its memory, its link and its firmware (imbue-ai/cluster-health and Azure's node health checks).
HARDWARE = {
    *(48, 56, 57, 58, *range(62, 66), *range(68, 78), *range(79, 87), 88, 89, 92),
    *(*range(94, 106), *range(110, 121), *range(122, 126)),
}
#: The Xid of a GPU that fell off the bus.
FALLEN = 79
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
    where = gpu.get("bus") or dict(enumerate(state["devices"])).get(gpu["index"], f"GPU {gpu['index']}")
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
    """One finding for each number. Of a GPU that is lost, its own finding says why."""
    gone = any(gpu["code"] == GPU_IS_LOST for gpu in state["gpus"])
    seen: dict[int, list[dict[str, Any]]] = {}
    for xid in xids(state["log"]):
        if not (gone and xid["number"] == FALLEN):
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
        if state["mps"] is not None and not state["mps"]["answers"]:
            # That is the finding.
            return found
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
        found.append(Finding("mps.limits", "major", what, str(mps["percentage"]), str(percentage), DEPLOY))
    memory = wanted["pinned_memory_limit_mib"]
    if not same_memory(mps["memory"], memory):
        what, expected = "MPS' limit of pinned device memory", f"{memory} MiB" if memory is not None else "none"
        found.append(Finding("mps.limits", "major", what, mps["memory"] or "none", expected, DEPLOY))
    return found


def number(words: str | None) -> float | None:
    try:
        return float(words or "")
    except ValueError:
        return None


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

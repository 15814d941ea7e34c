# SPDX-License-Identifier: MIT
"""gpulab-health: what it makes of what it reads, and what a deploy makes of that."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory import GpulabError
from operations.nvidia.remote import gpulab_health, health
from operations.nvidia.remote.gpulab_health import judge

# The package's own name `health` is the operation.
operation = importlib.import_module("operations.nvidia.health")

BUS = "00000000:01:00.0"
LOAD = {
    "by": "gpulab-health",
    "error": "",
    "samples": 20,
    "generation": 4,
    "width": 16,
    "clock_mhz": 1560,
    "utilisation": 30,
    "reasons": 0x4,
}


def sound() -> dict[str, Any]:
    """The state of a guest whose GPU is in order, at rest, with all that can be declared."""
    return {
        "time": 1000.0,
        "devices": ["0000:01:00.0"],
        "loaded": "580.95.05",
        "on_disk": None,
        "nouveau": False,
        "library": "580.95.05",
        "simulated": False,
        "log": [],
        "settings": {
            "persistence": True,
            "accounting": True,
            "power_limit_w": 120,
            "clocks": [210, 1560],
            "ecc": True,
            "compute_mode": "EXCLUSIVE_PROCESS",
        },
        "expected": {
            "link_width": 16,
            "link_generation": 3,
            "mps": {"active_thread_percentage": 60, "pinned_memory_limit_mib": 4096},
        },
        "lowered": {},
        "before": {"GPU-1": {"replays": 5, "time": 400.0}},
        "mps": {"unit": "active", "answers": True, "says": "60.0", "percentage": "60.0", "memory": "4G"},
        "nvml": {"code": 0, "error": None, "version": "580.95.05"},
        "gpus": [
            {
                "index": 0,
                "error": None,
                "code": 0,
                "name": "NVIDIA RTX A4000",
                "uuid": "GPU-1",
                "bus": BUS,
                "ecc": {"current": 1, "pending": 1},
                "ecc_errors": {"volatile uncorrected": 0, "aggregate uncorrected": 0, "volatile corrected": 9},
                "rows": {"corrected": 1, "uncorrected": 0, "pending": 0, "failure": 0},
                "width": 16,
                "width_max": 16,
                "generation": 1,
                "generation_max": 4,
                "reasons": 0x1,
                "replays": 5,
                "persistence": 1,
                "accounting": 1,
                "compute_mode": 3,
                "power_limit_w": 120.0,
                "power_default_w": 140.0,
                "temperature_c": 47,
                "thresholds_c": {"slowdown": 95, "full clocks": 90},
                "processes": [],
                "unknown": {},
                "load": dict(LOAD),
            }
        ],
    }


def changed(place: str, value: Any) -> dict[str, Any]:
    """The sound state with one value replaced; `place` is a dotted path."""
    state = sound()
    here: Any = state
    *parents, last = place.split(".")
    for part in parents:
        here = here[int(part) if isinstance(here, list) else part]
    here[last] = value
    return state


def said(*messages: str) -> list[dict[str, Any]]:
    return [{"time": 500.0 + number, "message": message} for number, message in enumerate(messages)]


def xid(number: int, rest: str = "pid=7, name=python3, Ch 8") -> str:
    return f"NVRM: Xid (PCI:0000:01:00): {number}, {rest}"


def test_sound_gpu_has_no_findings() -> None:
    assert judge(sound()) == []
    assert gpulab_health.summary(sound()) == (
        f"healthy: driver 580.95.05, NVIDIA RTX A4000 at {BUS}: 47 °C, link x16 generation 4 under load"
    )
    assert gpulab_health.summary(sound() | {"simulated": True}).endswith(" [simulated]")


LOST = [{"index": 0, "error": "GPU is lost", "code": 15}]
CASES: list[tuple[str, Any, str, str, str]] = [
    ("log", said(xid(79, "pid='<unknown>', GPU has fallen off the bus.")), "xid.hardware", "critical", "fallen"),
    ("log", said(xid(94), xid(94)), "xid.hardware", "major", "2 times"),
    ("log", said(xid(31)), "xid.application", "minor", "process 7 (python3)"),
    ("log", said(xid(16)), "xid.other", "major", "once"),
    ("gpus.0.ecc_errors.volatile uncorrected", 3, "ecc.uncorrected", "major", "3 since"),
    ("gpus.0.ecc_errors.aggregate uncorrected", 2, "ecc.aggregate", "minor", "2 in the card's life"),
    ("gpus.0.rows.pending", 1, "rows.pending", "major", "waits for a reset"),
    ("gpus.0.rows.failure", 1, "rows.failure", "critical", "could not be remapped"),
    ("gpus.0.rows.uncorrected", 1, "rows.uncorrectable", "minor", "1, expected 0"),
    ("gpus.0.rows.uncorrected", 513, "rows.uncorrectable", "major", "replace the card"),
    ("gpus.0.width", 8, "link.width", "major", "x8, expected x16"),
    ("gpus.0.load.generation", 2, "link.generation", "major", "generation 2, expected generation 3"),
    ("gpus.0.load.error", "cuInit: CUDA_ERROR_NO_DEVICE (100)", "load", "major", "cuInit"),
    ("gpus.0.load.reasons", 0x4 | 0x80, "throttle", "major", "external power brake, expected at most idle"),
    ("gpus.0.reasons", 0x20, "throttle", "minor", "software thermal slowdown"),
    ("gpus.0.reasons", 0x28, "throttle", "major", "hardware slowdown, software thermal slowdown"),
    ("gpus.0.replays", 6, "link.replay", "minor", "1 more in 10.0 min"),
    ("gpus.0.replays", 105, "link.replay", "major", "100 more in 10.0 min"),
    ("gpus.0.temperature_c", 91, "temperature", "major", "91 °C, expected below 90 °C"),
    ("gpus.0.temperature_c", 95, "temperature", "critical", "below 95 °C"),
    ("gpus.0.persistence", 0, "persistence", "major", "off, expected on"),
    ("gpus.0.accounting", 0, "accounting", "minor", "off, expected on"),
    ("gpus.0.power_limit_w", 140.0, "power_limit", "major", "140 W, expected 120 W"),
    ("settings.power_limit_w", None, "power_limit", "major", "120 W, expected 140 W"),
    ("gpus.0.compute_mode", 0, "compute_mode", "major", "DEFAULT, expected EXCLUSIVE_PROCESS"),
    ("gpus.0.ecc", {"current": 0, "pending": 1}, "ecc.mode", "major", "reboot the guest"),
    ("gpus.0.ecc", {"current": 0, "pending": 0}, "ecc.mode", "major", "gpulab-gpu-settings"),
    ("gpus.0.load.clock_mhz", 1800, "clocks", "major", "1800 MHz, expected at most 1560 MHz"),
    ("gpus.0.unknown", {"replay counter": "Not Supported"}, "unknown", "minor", "replay counter (Not Supported)"),
    ("mps.answers", False, "mps.daemon", "major", "does not answer"),
    ("mps.percentage", "100.0", "mps.limits", "major", "100.0, expected 60"),
    ("mps.memory", "16G", "mps.limits", "major", "16G, expected 4096 MiB"),
    ("expected.mps.pinned_memory_limit_mib", None, "mps.limits", "major", "4G, expected none"),
    ("mps.memory", "", "mps.limits", "major", "none, expected 4096 MiB"),
    ("gpus", LOST, "gpu.lost", "critical", "stop and start the VM"),
    (
        "gpus",
        [{"index": 0, "error": "Unknown Error", "code": 999}],
        "gpu.error",
        "critical",
        "0000:01:00.0 does not answer",
    ),
]


@pytest.mark.parametrize(
    ("place", "value", "id_", "severity", "words"), CASES, ids=[f"{case[2]}-{case[0]}-{case[4]}" for case in CASES]
)
def test_each_fault_is_one_finding(place: str, value: Any, id_: str, severity: str, words: str) -> None:
    (finding,) = judge(changed(place, value))

    assert (finding.id, finding.severity) == (id_, severity)
    assert words in str(finding)
    assert finding.command


@pytest.mark.parametrize(
    ("changes", "id_", "words"),
    [
        ({"devices": []}, "gpu.absent", "hostpci0"),
        ({"devices": [], "log": said(xid(79, "GPU has fallen off the bus."))}, "gpu.absent", "fallen off the bus."),
        ({"gpus": []}, "gpu.absent", "NVML shows none"),
        ({"loaded": None, "on_disk": None}, "driver.absent", "no module nvidia on disk"),
        ({"loaded": None, "on_disk": "580.95.05"}, "driver.absent", "modprobe nvidia"),
        ({"loaded": None, "on_disk": "580.95.05", "nouveau": True}, "driver.absent", "nouveau has the card"),
        ({"nvml": {"code": 9, "error": "Driver Not Loaded"}}, "driver.absent", "though module 580.95.05 is loaded"),
        ({"nvml": {"code": 12, "error": "NVML Shared Library Not Found"}}, "driver.library", "libnvidia-ml.so.1"),
        ({"nvml": {"code": 15, "error": "GPU is lost"}}, "gpu.lost", "0000:01:00.0 is lost"),
        (
            {"nvml": {"code": 18, "error": "mismatch"}, "library": "580.105.08"},
            "driver.mismatch",
            "module 580.95.05 is loaded, the library is 580.105.08",
        ),
        ({"nvml": {"code": 999, "error": "Unknown Error"}}, "nvml.error", "Unknown Error"),
        ({"nvml": {"code": None, "error": "there is no pynvml.py"}}, "nvml.module", "there is no pynvml.py"),
    ],
)
def test_without_gpu_or_driver_one_line_says_why(changes: dict[str, Any], id_: str, words: str) -> None:
    """Not a stack of failures: MPS and the kernel's log would each have their own to tell."""
    state = {**sound(), "log": said(xid(31)), "mps": {"unit": "failed", "answers": False, "says": ""}, **changes}

    (finding,) = judge(state)

    assert finding.id == id_
    assert words in str(finding)


def test_client_that_mps_does_not_serve_is_no_second_finding() -> None:
    state = changed("mps.answers", False)
    state["gpus"][0]["load"]["error"] = "cuInit: CUDA_ERROR_MPS_CONNECTION_FAILED (805)"

    assert [finding.id for finding in judge(state)] == ["mps.daemon"]


def test_memory_limit_is_told_in_whole_gibibytes() -> None:
    assert judge(changed("expected.mps.pinned_memory_limit_mib", 4100)) == []


def test_gpu_that_fell_off_the_bus_is_one_finding() -> None:
    state = changed("gpus", LOST)
    state["log"] = said(xid(79), "NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.")

    (finding,) = judge(state)

    assert finding.id == "gpu.lost"
    assert "the kernel log says: NVRM: GPU 0000:01:00.0: GPU has fallen off the bus." in finding.seen


def test_worst_finding_comes_first() -> None:
    state = changed("gpus.0.rows.failure", 1)
    state["log"] = said(xid(31))
    state["gpus"][0]["width"] = 8

    assert [finding.severity for finding in judge(state)] == ["critical", "major", "minor"]


def test_every_gpu_is_judged() -> None:
    state = sound()
    second = copy.deepcopy(state["gpus"][0]) | {"bus": "00000000:02:00.0", "uuid": "GPU-2", "width": 4}
    state["gpus"] = [*LOST, second]

    assert [finding.id for finding in judge(state)] == ["gpu.lost", "link.width"]
    assert "02:00.0" in judge(state)[1].what


def test_generation_at_rest_is_not_judged() -> None:
    state = changed("gpus.0.load", None)

    assert judge(state) == []
    assert "judged with --load" in gpulab_health.summary(state)


@pytest.mark.parametrize(("utilisation", "ids"), [(0, []), (None, []), (40, ["link.generation"])])
def test_load_of_others_is_judged_when_they_work(utilisation: int | None, ids: list[str]) -> None:
    state = sound()
    state["gpus"][0]["processes"] = [{"pid": 9, "name": "ollama", "uid": 850}]
    state["gpus"][0]["load"] |= {"by": "others", "utilisation": utilisation, "generation": 1}

    assert [finding.id for finding in judge(state)] == ids
    if not ids:
        assert "not known: ollama (9) hold the card" in gpulab_health.summary(state)


def test_unset_expectations_come_from_the_card_itself() -> None:
    state = changed("expected", {})
    state["gpus"][0]["width_max"] = 8
    state["gpus"][0]["width"] = 8

    assert [finding.id for finding in judge(state)] == []
    state["gpus"][0]["width"] = 4
    state["gpus"][0]["load"]["generation"] = 3
    assert [finding.id for finding in judge(state)] == ["link.width", "link.generation"]


@pytest.mark.parametrize(("watts", "severity"), [(110.0, "minor"), (100.0, "major")])
def test_limit_that_the_thermal_policy_lowered_is_told_as_that(watts: float, severity: str) -> None:
    state = changed("gpus.0.power_limit_w", watts)
    state["lowered"] = {BUS: {"limit_mw": 110000}}

    (finding,) = judge(state)

    assert (finding.severity, "thermal policy lowered it" in finding.command) == (severity, severity == "minor")


def test_without_declared_settings_only_lost_ones_count() -> None:
    state = changed("settings", None)
    state["gpus"][0] |= {"compute_mode": 0, "power_limit_w": 100.0, "ecc": {"current": 0, "pending": 0}}

    assert judge(state) == []
    state["gpus"][0]["persistence"] = 0
    assert [finding.severity for finding in judge(state)] == ["minor"]


def test_replays_of_a_driver_that_was_loaded_anew_do_not_count() -> None:
    assert judge(changed("gpus.0.replays", 4)) == []
    assert judge(changed("before", {})) == []


@pytest.mark.parametrize(
    ("rest", "pid", "name"),
    [
        ("pid=1234, name=python3, Ch 00000008, intr 00000000", 1234, "python3"),
        ("pid='<unknown>', name=<unknown>, GPU has fallen off the bus.", None, None),
        ("pid='77', name='ollama', MMU Fault", 77, "ollama"),
        ("GPU has fallen off the bus.", None, None),
    ],
)
def test_xid_tells_the_process(rest: str, pid: int | None, name: str | None) -> None:
    (found,) = gpulab_health.xids(said(xid(13, rest), "NVRM: loading", "Xid: 3"))

    assert (found["number"], found["pid"], found["name"]) == (13, pid, name)
    assert (found["device"], found["time"]) == ("PCI:0000:01:00", 500.0)


def test_kernel_log_is_read_from_journal_and_ring_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message that both have is one."""
    line = {"__REALTIME_TIMESTAMP": "1700000100000000", "MESSAGE": xid(31)}
    outputs = {"journalctl": json.dumps(line) + "\n", "dmesg": f"[    5.5] {xid(79)}\n[   99.0] {xid(31)}\n[1.0] usb\n"}
    monkeypatch.setattr(health, "run", lambda *argv: (0, outputs[argv[0]], ""))
    monkeypatch.setattr(health, "text", lambda path: "cpu 1\nbtime 1700000000\n")

    assert health.kernel_log() == [
        {"time": 1700000005.5, "message": xid(79)},
        {"time": 1700000100.0, "message": xid(31)},
    ]


@pytest.mark.parametrize(
    ("place", "value", "status", "words"),
    [
        ("time", 1000.0, 0, "healthy: "),
        ("log", said(xid(31)), 1, "minor: Xid 31"),
        ("gpus.0.width", 8, 2, "major: the PCIe link"),
        ("devices", [], 3, "critical: no GPU"),
    ],
)
def test_exit_status_says_how_bad_it_is(
    place: str, value: Any, status: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpulab_health, "observe", lambda load: changed(place, value))
    monkeypatch.setattr(gpulab_health, "MEMORY", str(tmp_path / "run/health.json"))

    assert gpulab_health.main([]) == status
    assert capsys.readouterr().out.startswith(words)
    assert gpulab_health.main(["--json"]) == status
    assert json.loads(capsys.readouterr().out)["status"] == status
    assert json.loads((tmp_path / "run/health.json").read_text()) == {"GPU-1": {"replays": 5, "time": 1000.0}}


def test_wrong_usage_is_no_verdict(capsys: Any) -> None:
    assert gpulab_health.main(["--laod"]) == 64
    assert gpulab_health.main(["--help"]) == 0


def test_program_runs_without_gpu_and_without_pynvml(tmp_path: Path) -> None:
    program = tmp_path / "gpulab-health"
    file = operation.wanted_files({})[operation.PROGRAM]
    assert file is not None
    program.write_text(file.content)
    program.chmod(file.mode)

    done = subprocess.run([program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout.startswith("critical: no GPU on the guest's PCI bus")
    assert len(done.stdout.splitlines()) == 1


# The operation.

EXPECTED = {"link_width": 16, "link_generation": 3, "mps": None}


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A guest whose health the tests doctor, with all files in place; what the step says of itself is kept in it."""
    files = {
        path: [hashlib.sha256(file.content.encode()).hexdigest(), file.mode]
        for path, file in operation.wanted_files(EXPECTED).items()
        if file is not None
    }
    found: dict[str, Any] = {"fact": {"files": files, "health": sound()}, "noop": [], "changes": [], "warnings": []}
    keep: Callable[[str], Callable[..., None]] = lambda key: lambda first, *_: found[key].append(str(first))  # noqa: E731
    monkeypatch.setattr(operation.step, "read", lambda fact, files: found["fact"])
    for name in ("noop", "changes"):
        monkeypatch.setattr(operation.step, name, keep(name))
    monkeypatch.setattr(operation, "warn", lambda findings: found["warnings"].extend(map(str, findings)))
    return found


def commands() -> list[Any]:
    return list(operation.health._inner(EXPECTED))


def test_sound_guest_is_left_alone(guest: dict[str, Any]) -> None:
    assert commands() == []
    assert guest["noop"] == [gpulab_health.summary(sound())]


def test_lesser_findings_are_told_and_change_nothing(guest: dict[str, Any]) -> None:
    guest["fact"]["health"] = changed("gpus.0.width", 8)

    assert commands() == []
    assert guest["changes"] == []
    assert [line.partition(":")[0] for line in guest["warnings"]] == ["major"]


def test_lost_gpu_stops_the_deploy_with_the_command_that_helps(guest: dict[str, Any]) -> None:
    guest["fact"]["health"] = changed("gpus", LOST)

    # The plan goes on: an earlier step may heal it.
    assert len(commands()) == 1
    assert guest["changes"] == []
    with pytest.raises(GpulabError) as refused:
        operation.check(EXPECTED)
    assert str(refused.value.brief) == "0000:01:00.0 is lost"
    assert "GPU is lost" in str(refused.value) and "stop and start the VM" in str(refused.value)


@pytest.mark.parametrize("path", [operation.PROGRAM, "/usr/local/lib/gpulab/pynvml.py", health.EXPECTED])
def test_only_what_differs_is_written(guest: dict[str, Any], path: str) -> None:
    guest["fact"]["files"][path] = ["0" * 64, 0o644]

    assert len(commands()) == 2
    assert guest["changes"] == [f"file {path}"]


def test_guest_that_does_not_exist_yet_is_planned(guest: dict[str, Any]) -> None:
    guest["fact"] = {}

    assert len(commands()) == 2
    assert len(guest["changes"]) == 3

# SPDX-License-Identifier: MIT
"""gpulab-health's reading of the simulated card, through the real nvidia-ml-py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from operations.nvidia.health import PROGRAM, wanted_files
from operations.nvidia.library import nvml
from operations.nvidia.remote.gpulab_health import judge
from tests.rehearsal.test_nvidia_card import Card
from tests.rehearsal.test_nvidia_card import card as card
from tests.rehearsal.test_nvidia_card import programs as programs
from tests.unit.test_nvidia_health import sound


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """The program as it is installed, with its module of NVML and its other files below the test's folder."""
    file, module = wanted_files({})[PROGRAM], next(iter(nvml().values()))
    assert file is not None and module is not None
    path = tmp_path / "gpulab_health.py"
    path.write_text(file.content)
    (tmp_path / "pynvml.py").write_text(module.content)
    return path


def read(card: Card, program: Path, load: bool, mps: bool = False) -> dict[str, Any]:
    """What the program reads through NVML, in a process of its own."""
    code = (
        f"import json, sys; sys.path.insert(0, {str(program.parent)!r}); import gpulab_health as health\n"
        f"health.LIBRARY, health.MPS_UNIT = {str(program.parent)!r}, {'/' if mps else '/absent'!r}\n"
        f"print(json.dumps(health.nvml_state({load})))"
    )
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=card.environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def findings(card: Card, program: Path, load: bool = False) -> list[str]:
    """The ids of what judge() finds on a guest with this card and nothing declared."""
    state = {**sound(), "settings": None, "expected": {}, "before": {}, "mps": None, **read(card, program, load)}
    return [finding.id for finding in judge(state)]


def test_card_in_order(card: Card, program: Path) -> None:
    found = read(card, program, load=False)

    gpu = found["gpus"][0]
    assert (found["nvml"]["error"], gpu["bus"], gpu["width"], gpu["replays"]) == (None, "00000000:01:00.0", 16, 0)
    assert gpu["rows"] == {"corrected": 0, "uncorrected": 0, "pending": 0, "failure": 0}
    # ECC is off, as the card comes: its counters are not asked for, and so are not unknown.
    assert (gpu["ecc"]["current"], gpu["ecc_errors"], gpu["unknown"]) == (0, None, {})
    assert gpu["thresholds_c"] == {"slowdown": 95, "full clocks": 90}


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({}, ["persistence"]),
        ({"lost": 1}, ["gpu.lost"]),
        ({"init_error": 18}, ["driver.mismatch"]),
        ({"init_error": 999}, ["nvml.error"]),
        ({"device_count": 0}, ["gpu.absent"]),
        ({"remapped_failure": 1}, ["rows.failure", "persistence"]),
        ({"remapped_pending": 1}, ["rows.pending", "persistence"]),
        ({"remapped_uncorrected": 3}, ["rows.uncorrectable", "persistence"]),
        ({"ecc_mode": 1, "ecc_uncorrected": 2}, ["ecc.uncorrected", "persistence"]),
        ({"link_width": 8}, ["link.width", "persistence"]),
        ({"event_reasons": 0x48}, ["throttle", "persistence"]),
        ({"event_reasons": 0x4}, ["persistence"]),
        # A hot card slows itself down.
        ({"temperature_c": 92}, ["temperature", "throttle", "persistence"]),
        ({"temperature_c": 96}, ["temperature", "throttle", "persistence"]),
    ],
)
def test_each_fault_of_the_card_is_found(
    card: Card, program: Path, faults: dict[str, int], expected: list[str]
) -> None:
    card.faults(**faults)

    assert findings(card, program) == expected


def test_driver_of_another_version_than_the_library(card: Card, program: Path) -> None:
    card.load("580.105.08")

    assert findings(card, program) == ["driver.mismatch"]


@pytest.mark.parametrize(("faults", "expected"), [({}, []), ({"link_generation": 1}, ["link.generation"])])
def test_link_is_judged_under_the_load_of_others(
    card: Card, program: Path, faults: dict[str, int], expected: list[str]
) -> None:
    card.faults(utilization_percent=50, **faults)
    client = card.client(100)
    try:
        assert client.stdout is not None and client.stdout.readline().split() == ["0", "0", "0"]
        load = read(card, program, load=True)["gpus"][0]["load"]
        assert (load["by"], load["samples"] > 3, load["utilisation"]) == ("others", True, 50)
        assert findings(card, program, load=True) == [*expected, "persistence"]
    finally:
        client.communicate("")


@pytest.mark.parametrize(
    ("mps", "faults", "by"),
    [(True, {}, "gpulab-health"), (False, {}, "others"), (True, {"utilization_percent": 30}, "others")],
)
def test_idle_users_of_mps_leave_room_for_a_load(
    card: Card, program: Path, mps: bool, faults: dict[str, int], by: str
) -> None:
    card.faults(**faults)
    client = card.client(100)
    try:
        assert client.stdout is not None and client.stdout.readline().split() == ["0", "0", "0"]
        load = read(card, program, load=True, mps=mps)["gpus"][0]["load"]
        assert (load["by"], load["error"], load["generation"]) == (by, "", 4)
    finally:
        client.communicate("")


def test_load_of_its_own(card: Card, program: Path) -> None:
    load = read(card, program, load=True)["gpus"][0]["load"]

    assert (load["by"], load["error"], load["generation"], load["samples"] > 3) == ("gpulab-health", "", 4, True)
    card.environment["CUDA_VISIBLE_DEVICES"] = ""
    assert read(card, program, load=True)["gpus"][0]["load"]["error"] == "cuInit: CUDA_ERROR_NO_DEVICE (100)"

# SPDX-License-Identifier: MIT
"""What a card is set to: what counts as different, what it refuses, and the installed program on the simulated card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from operations.nvidia.remote.settings import differing, refused
from operations.nvidia.settings import decide, ecc_due, library_digest, wanted_files
from operations.nvidia.units import installed
from rehearsal.nvidia import service

DECLARED: dict[str, Any] = {
    "persistence": True,
    "accounting": True,
    "power_limit_w": 120,
    "clocks": None,
    "ecc": None,
    "compute_mode": "EXCLUSIVE_PROCESS",
}
GPU: dict[str, Any] = {
    "name": "NVIDIA RTX A4000",
    "bus": "00000000:01:00.0",
    "persistence": 1,
    "accounting": 1,
    "power_limit_mw": 120000,
    "power_default_mw": 140000,
    "power_range_mw": [100000, 140000],
    "clock_mhz": 210,
    "clock_max_mhz": 2100,
    "ecc": [0, 0],
    "compute_mode": 3,
}


def differences(gpu: dict[str, Any], declared: dict[str, Any], locked: Any = None, lowered: int | None = None) -> Any:
    return differing({**GPU, **gpu}, {**DECLARED, **declared}, locked, lowered)


@pytest.mark.parametrize(
    ("gpu", "declared", "expected"),
    [
        ({}, {}, {}),
        ({"power_limit_mw": 130000}, {}, {"power limit": ("130 W", "120 W")}),
        # No longer declared: the card's own again.
        ({}, {"power_limit_w": None}, {"power limit": ("120 W", "140 W")}),
        ({"power_limit_mw": None, "power_default_mw": None}, {"power_limit_w": None}, {}),
        ({"persistence": 0}, {}, {"persistence mode": ("off", "on")}),
        ({"accounting": 0}, {}, {"accounting mode": ("off", "on")}),
        ({"accounting": None}, {}, {}),
        ({"compute_mode": 0}, {}, {"compute mode": ("DEFAULT", "EXCLUSIVE_PROCESS")}),
        ({}, {"ecc": True}, {"ECC": ("off", "on")}),
        # Pending is all that can be set; the reboot is another matter.
        ({"ecc": [0, 1]}, {"ecc": True}, {}),
        ({"ecc": None}, {"ecc": False}, {}),
    ],
)
def test_what_differs(gpu: dict[str, Any], declared: dict[str, Any], expected: dict[str, tuple[str, str]]) -> None:
    assert differences(gpu, declared) == expected


def test_a_limit_that_the_thermal_policy_lowered_is_no_difference_and_any_other_is() -> None:
    assert differences({"power_limit_mw": 110000}, {}, lowered=110000) == {}
    assert differences({"power_limit_mw": 105000}, {}, lowered=110000) == {"power limit": ("105 W", "120 W")}
    # Above the declared limit nothing is the policy's doing.
    assert differences({"power_limit_mw": 130000}, {}, lowered=130000) == {"power limit": ("130 W", "120 W")}


def test_a_lock_is_known_by_what_was_noted_and_by_a_clock_that_breaks_it() -> None:
    clocks = {"clocks": [300, 1200]}
    assert differences({}, clocks) == {"graphics clock": ("unlocked", "300 to 1200 MHz")}
    assert differences({}, clocks, locked=[300, 1200]) == {}
    # The card rounds to steps of 15 MHz.
    assert differences({"clock_mhz": 1215}, clocks, locked=[300, 1200]) == {}
    broken = differences({"clock_mhz": 1560}, clocks, locked=[300, 1200])
    assert broken == {"graphics clock": ("1560 MHz", "300 to 1200 MHz")}
    assert differences({}, {}, locked=[300, 1200]) == {"graphics clock": ("300 to 1200 MHz", "unlocked")}


@pytest.mark.parametrize(
    ("gpu", "declared", "expected"),
    [
        ({}, {}, ""),
        ({}, {"power_limit_w": 99}, "power_limit_w = 99: expected 100 to 140 W"),
        ({}, {"power_limit_w": 141}, "power_limit_w = 141: expected 100 to 140 W"),
        ({"power_range_mw": None}, {}, "power_limit_w = 120: it takes no power limit"),
        ({}, {"clocks": [300, 2115]}, "clocks = 300 to 2115 MHz: expected at most 2100 MHz"),
        ({"ecc": None}, {"ecc": True}, "ecc = true: it has none"),
    ],
)
def test_what_the_card_refuses(gpu: dict[str, Any], declared: dict[str, Any], expected: str) -> None:
    found = refused({**GPU, **gpu}, {**DECLARED, **declared})
    assert found == ([f"NVIDIA RTX A4000 (00000000:01:00.0): {expected}"] if expected else [])


def test_a_guest_that_does_not_exist_yet_gets_everything() -> None:
    actions = decide({}, DECLARED)
    assert actions.library and actions.persistenced and actions.apply
    assert set(actions.files) == set(wanted_files(DECLARED))


def test_ecc_of_a_card_that_cannot_be_read_yet_may_need_a_reboot() -> None:
    assert ecc_due({}, DECLARED) == ""
    assert ecc_due({}, {**DECLARED, "ecc": True}) == "ECC on, if the card has it otherwise"
    assert ecc_due({"gpus": [{**GPU, "ecc": [1, 0]}]}, {**DECLARED, "ecc": False}) == "ECC off of NVIDIA RTX A4000"
    assert ecc_due({"gpus": [GPU]}, {**DECLARED, "ecc": False}) == ""


def test_the_library_on_the_guest_is_the_one_beside_gpulab() -> None:
    import pynvml

    assert pynvml.__file__
    assert len(library_digest()) == 64


# The installed program, against the simulated card. Only root may set it.


class Guest:
    """A loaded driver with its card, below a folder of the test, and our programs as they are installed."""

    def __init__(self, libraries: Path, root: Path) -> None:
        self.root = root
        for name in ("dev", "run/lab-gpu", "run/gpulab", "var/lib/lab-hardware", "etc"):
            (root / name).mkdir(parents=True)
        (root / "dev/nvidiactl").touch()
        (root / "run/lab-gpu/settings").write_bytes(bytes(4096))
        (root / "run/lab-gpu/clients").touch()
        (root / "run/lab-gpu/driver").write_text(
            "version=580.95.05\ndevice=0000:01:00.0 10de:24b0 14ad10de GPU-51a7ed00-0000-4000-8000-000000001000\n"
        )
        self.environment = {**os.environ, "LAB_GPU_ROOT": str(root), "LD_LIBRARY_PATH": str(libraries)}
        # As the persistence daemon does it: without a user, the card forgets everything.
        self.nvml("N.nvmlDeviceSetPersistenceMode(d, 1)")

    def text(self, name: str) -> str:
        """The program with its files below our folder. NVML's module is this Python's own."""
        text = installed(name).content
        for path in ("/etc/gpulab/", "/run/gpulab/"):
            text = text.replace(f'"{path}', f'"{self.root}{path.replace("gpulab/", "")}')
        return text

    def run(self, declared: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        (self.root / "etc/gpu.json").write_text(json.dumps({**DECLARED, **declared}))
        argv = [sys.executable, "-c", self.text("settings")]
        return subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=False)

    def read(self) -> dict[str, Any]:
        argv = [sys.executable, "-c", self.text("settings"), json.dumps({"paths": ["/etc/hostname"], "unit_names": []})]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def nvml(self, code: str) -> Any:
        program = (
            f"import json, pynvml as N\nN.nvmlInit()\nd = N.nvmlDeviceGetHandleByIndex(0)\nprint(json.dumps({code}))"
        )
        argv = [sys.executable, "-c", program]
        done = subprocess.run(argv, env=self.environment, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0:
        pytest.skip("not run: only root can set the simulated card")
    folder = tmp_path_factory.mktemp("libraries")
    (folder / "libnvidia-ml.so.1").write_bytes(service.compile_driver("580.95.05", 13000).nvml)
    return folder


@pytest.fixture
def guest(libraries: Path, tmp_path: Path) -> Guest:
    return Guest(libraries, tmp_path)


def test_program_sets_what_is_declared_and_a_second_run_does_nothing(guest: Guest) -> None:
    done = guest.run({})
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "NVIDIA RTX A4000 (00000000:01:00.0): accounting mode: off -> on",
        "NVIDIA RTX A4000 (00000000:01:00.0): power limit: 140 W -> 120 W",
        "NVIDIA RTX A4000 (00000000:01:00.0): compute mode: DEFAULT -> EXCLUSIVE_PROCESS",
    ]
    assert (guest.run({}).returncode, guest.run({}).stdout) == (0, "")
    (gpu,) = guest.read()["gpus"]
    assert (gpu["power_limit_mw"], gpu["compute_mode"], gpu["accounting"]) == (120000, 3, 1)


def test_program_gives_the_card_its_default_back(guest: Guest) -> None:
    assert guest.run({}).returncode == 0
    assert guest.run({"power_limit_w": None}).returncode == 0
    assert guest.read()["gpus"][0]["power_limit_mw"] == 140000


def test_program_sets_nothing_when_one_value_is_refused(guest: Guest) -> None:
    done = guest.run({"power_limit_w": 300})
    assert done.returncode == 1
    assert done.stderr == "NVIDIA RTX A4000 (00000000:01:00.0): power_limit_w = 300: expected 100 to 140 W\n"
    assert guest.nvml("N.nvmlDeviceGetComputeMode(d)") == 0


def test_program_leaves_what_the_thermal_policy_has_lowered(guest: Guest) -> None:
    assert guest.run({}).returncode == 0
    guest.nvml("N.nvmlDeviceSetPowerManagementLimit(d, 110000)")
    (guest.root / "run/thermal.json").write_text(json.dumps({"00000000:01:00.0": {"limit_mw": 110000}}))
    assert (guest.run({}).returncode, guest.run({}).stdout) == (0, "")
    assert guest.read()["gpus"][0]["lowered_mw"] == 110000


def test_program_locks_clocks_and_lets_them_go(guest: Guest) -> None:
    assert guest.run({"clocks": [900, 1200]}).returncode == 0
    found = guest.read()
    # The simulated card holds the lower bound at rest.
    assert (found["locked"], found["gpus"][0]["clock_mhz"]) == ([900, 1200], 900)
    assert guest.run({}).returncode == 0
    found = guest.read()
    assert (found["locked"], found["gpus"][0]["clock_mhz"]) == (None, 210)


def test_program_fails_where_a_clock_does_not_follow(guest: Guest) -> None:
    (guest.root / "var/lib/lab-hardware/nvml.conf").write_text("sm_clock_mhz=1560\n")
    done = guest.run({"clocks": [300, 1200]})
    assert done.returncode == 1
    assert done.stderr.endswith("graphics clock: asked for 300 to 1200 MHz, reads 1560 MHz\n")


def test_program_leaves_ecc_pending_for_a_reboot(guest: Guest) -> None:
    assert guest.run({"ecc": True}).returncode == 0
    assert guest.read()["gpus"][0]["ecc"] == [0, 1]
    assert guest.run({"ecc": True}).stdout == ""


def test_program_says_what_nvml_says(guest: Guest) -> None:
    (guest.root / "run/lab-gpu/driver").unlink()
    done = guest.run({})
    assert (done.returncode, done.stderr) == (1, "NVML: Driver Not Loaded\n")
    found = guest.read()
    assert (found["error"], found["gpus"]) == ("Driver Not Loaded", [])


def test_torn_settings_are_named(guest: Guest) -> None:
    assert guest.run({}).returncode == 0
    (guest.root / "etc/gpu.json").write_text("{")
    argv: list[str] = [sys.executable, "-c", guest.text("settings")]
    done = subprocess.run(argv, env=guest.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{guest.root}/etc/gpu.json: ")


def wait_for(question: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 10
    while not question():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_thermal_daemon_lowers_raises_and_gives_back(guest: Guest) -> None:
    """A fault file of the simulated card says how hot it is."""
    policy = {"warning_c": 83, "critical_c": 90, "action": "lower-power", "step_w": 10, "hysteresis_c": 5}
    (guest.root / "etc/thermal.json").write_text(json.dumps({**policy, "interval_s": 0.05}))
    assert guest.run({}).returncode == 0
    heat = guest.root / "var/lib/lab-hardware/nvml.conf"
    heat.write_text("temperature_c=91\n")

    def limit() -> int:
        return int(guest.read()["gpus"][0]["power_limit_mw"])

    argv = [sys.executable, "-c", guest.text("thermal")]
    with subprocess.Popen(argv, env=guest.environment, stdout=subprocess.PIPE, text=True) as daemon:
        try:
            wait_for(lambda: limit() == 100000)
            # Lowered by the policy: nothing that the settings would mend.
            assert (guest.run({}).returncode, guest.run({}).stdout) == (0, "")
            heat.write_text("temperature_c=70\n")
            wait_for(lambda: limit() == 120000)
            heat.write_text("temperature_c=95\n")
            wait_for(lambda: limit() < 120000)
        finally:
            daemon.terminate()
            said = daemon.communicate(timeout=10)[0]
    assert daemon.returncode == 0
    assert limit() == 120000
    assert not (guest.root / "run/thermal.json").exists()
    lines = said.splitlines()
    assert "00000000:01:00.0: 91 °C, critical: power limit 120 W -> 110 W" in lines
    assert "00000000:01:00.0: 70 °C, cooled down: power limit 110 W -> 120 W" in lines
    assert lines[-1].startswith("00000000:01:00.0: the policy ends: power limit ")

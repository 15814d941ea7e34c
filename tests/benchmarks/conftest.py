# SPDX-License-Identifier: MIT
"""The benchmarks on a simulated driver, which runs their own kernels on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from verify.benchmarks import KERNELS

SIMULATED = Path(__file__).parent / "simulated"
REPOSITORY = Path(__file__).parents[2]
#: Runs the program with so little effort that a test is done in a second.
TINY = """
import sys
from verify.benchmarks import gpubench
gpubench.QUICK = gpubench.Effort(TOTAL_S, 0.0, 0.0, 0.0, 0.0, 0.0001, 2, 2, 256 << 10, 1 << 20)
gpubench.SETTLE_S = 0
gpubench.GRACE_S = GRACE
gpubench.Telemetry.EVERY_S = 0.005
gpubench.Telemetry.LOOK_S = 0
sys.exit(gpubench.main(sys.argv[1:]))
"""


@dataclass
class Driver:
    """A folder with libcuda.so.1 and libnvidia-ml.so.1, and where they write down what they are asked."""

    folder: Path
    log: Path

    def environment(self, **simulation: object) -> dict[str, str]:
        return {
            **os.environ,
            "LD_LIBRARY_PATH": str(self.folder),
            "PYTHONPATH": str(REPOSITORY),
            "SIM_LOG": str(self.log),
            "SIM_MIB": "8",
            **{key: str(value) for key, value in simulation.items()},
        }

    def start(
        self, *words: str, total_s: float = 60.0, grace_s: float = 60.0, **simulation: object
    ) -> subprocess.Popen[str]:
        self.log.unlink(missing_ok=True)
        code = TINY.replace("TOTAL_S", str(total_s)).replace("GRACE\n", f"{grace_s}\n")
        return subprocess.Popen(
            [sys.executable, "-c", code, "--quick", "--seed=1", *words],
            env=self.environment(**simulation),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, total_s: float = 60.0, grace_s: float = 60.0, **simulation: object) -> Run:
        with self.start(*words, total_s=total_s, grace_s=grace_s, **simulation) as process:
            output, errors = process.communicate(timeout=120)
        return Run(process.returncode, json.loads(output), errors)

    def calls(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if line.startswith("cu")]

    def wrong_use(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("WRONG USE")]

    def left(self) -> str:
        """What the process had not freed at its end."""
        return self.log.read_text().splitlines()[-1].removeprefix("LEFT:").strip()


@dataclass
class Run:
    status: int
    result: dict[str, Any]
    errors: str

    @property
    def reason(self) -> str:
        return str(self.result["reason"])


FLAGS = ("-O1", "-fPIC", "-Wall", "-Werror", "-shared")


def cuda(folder: Path) -> None:
    # Products and sums stay apart, as on the card. The pragmas and unused helpers are the kernels' own.
    own = ["-ffp-contract=off", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-stringop-overflow"]
    objects = []
    for source in sorted(KERNELS.glob("*.cu")):
        include = ["-include", str(SIMULATED / "device.h"), "-x", "c++", "-c", str(source)]
        objects.append(str(folder / f"{source.stem}.o"))
        subprocess.run(["g++", *FLAGS[:-1], *own, *include, "-o", objects[-1]], check=True)
    words = ["-Wl,-soname,libcuda.so.1", str(SIMULATED / "cuda.cpp"), *objects, "-o", str(folder / "libcuda.so.1")]
    subprocess.run(["g++", *FLAGS, *words], check=True)


def nvml(folder: Path, *options: str) -> None:
    words = ["-Wl,-soname,libnvidia-ml.so.1", *options, str(SIMULATED / "nvml.c")]
    subprocess.run(["gcc", *FLAGS, *words, "-o", str(folder / "libnvidia-ml.so.1")], check=True)


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler: apt-get install g++")
    folder = tmp_path_factory.mktemp("driver")
    cuda(folder)
    nvml(folder)
    return folder


@pytest.fixture
def driver(libraries: Path, tmp_path: Path) -> Driver:
    return Driver(libraries, tmp_path / "log")


@pytest.fixture(scope="session")
def old_libraries(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with an NVML that lacks newer names."""
    folder = tmp_path_factory.mktemp("old-driver")
    shutil.copy(libraries / "libcuda.so.1", folder)
    nvml(folder, "-DOLD")
    return folder

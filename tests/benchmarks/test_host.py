# SPDX-License-Identifier: MIT
"""What the programs of tier 1 have in common, before the simulated driver and a container engine that is a script."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.conftest import Driver
from verify.benchmarks.contract import Report
from verify.benchmarks.host import device, others, report
from verify.hosts import ROOM

#: What runs on guests or in their containers.
PROGRAMS = [
    *ROOM.rglob("*remote.py"),
    *(path for path in (ROOM / "benchmarks").glob("*.py") if path.stem.endswith(("bench", "job", "host", "intervals"))),
    ROOM / "nvidia/nvml.py",
    ROOM / "containers/jobs.py",
]


def asked(driver: Driver, expression: str, **simulation: object) -> Any:
    """What the module says in a process of its own, which has that driver."""
    words = f"import json; from verify.benchmarks.host import *; print(json.dumps({expression}))"
    done = subprocess.run(
        [sys.executable, "-c", words],
        env=driver.environment(**simulation),
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.fixture
def stranger() -> Iterator[int]:
    """The id of a process that is none of the card's services."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process.pid
        process.kill()


def test_card_is_told_by_its_pci_id(driver: Driver) -> None:
    found = report("pytorch") | asked(driver, "device('cuda')") | {"verdict": "not run", "reason": "x"}

    read = Report.model_validate(found)
    assert read.card is not None
    assert (read.card.pci_id, read.card.uuid, read.driver) == ("10de:24b0", "GPU-1", "580.95.05")


def test_without_a_driver_there_is_no_card(driver: Driver) -> None:
    assert asked(driver, "[device('cuda')['card'], others([])]", SIM_NVML="nvmlInitWithFlags:9") == [None, []]
    assert device("cuda")["card"] is None and others([]) == []


def test_processor_has_the_kernels_name() -> None:
    found = device("cpu")

    assert (found["device"], found["card"]) == ("cpu", None)
    assert found["processor"] in Path("/proc/cpuinfo").read_text() or found["processor"] == os.uname().machine


@pytest.mark.parametrize("kind", ["compute", "mps", "graphics"])
def test_stranger_on_the_card_is_named(driver: Driver, tmp_path: Path, stranger: int, kind: str) -> None:
    (tmp_path / "there").write_text(f"{kind} {stranger}\n")

    found = asked(driver, "others(['ollama'])", SIM_PROCESSES=tmp_path / "there")

    assert found == [f"PID {stranger} sleep"]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_service_is_no_stranger(driver: Driver, tmp_path: Path, stranger: int, engine: str) -> None:
    """Its control group has its container's id in it; here the engine calls the whole of the group an id."""
    own = Path(f"/proc/{stranger}/cgroup").read_text().strip().rpartition("::")[2]
    (tmp_path / "there").write_text(f"compute {stranger}\n")
    script = tmp_path / engine
    script.write_text(f"#!/bin/sh\n[ $5 = ollama ] && echo '{own}'\n")
    script.chmod(0o755)
    simulation = {"SIM_PROCESSES": tmp_path / "there", "PATH": f"{tmp_path}:/usr/bin:/bin"}

    assert asked(driver, "others(['ollama', 'milvus'])", **simulation) == []
    assert asked(driver, "others(['milvus'])", **simulation) == [f"PID {stranger} sleep"]


def test_process_that_has_ended_is_no_stranger(driver: Driver, tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as process:
        pass
    (tmp_path / "there").write_text(f"compute {process.pid}\n")

    assert asked(driver, "others([])", SIM_PROCESSES=tmp_path / "there") == []


@pytest.mark.parametrize("script", sorted(PROGRAMS), ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_programs_for_guests_keep_to_the_syntax_of_python_3_10(script: Path) -> None:
    """As Ubuntu 22.04 has it."""
    ast.parse(script.read_text(), feature_version=(3, 10))

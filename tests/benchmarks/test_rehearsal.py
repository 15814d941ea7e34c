# SPDX-License-Identifier: MIT
"""The rehearsal's simulated card must never be taken for one that was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal.nvidia import service
from tests.rehearsal.test_nvidia_card import VERSION, Card
from verify.benchmarks import gpubench, program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    driver = service.compile_driver(VERSION, 13000)
    (folder / "libnvidia-ml.so.1").write_bytes(driver.nvml)
    (folder / "libcuda.so.1").write_bytes(driver.cuda)
    return folder


@pytest.fixture
def card(programs: Path, tmp_path: Path) -> Card:
    return Card(programs, tmp_path)


def measured(card: Card, text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-I", "-", "--quick"]
    return subprocess.run(command, input=text, env=card.environment, capture_output=True, text=True, check=False)


def test_simulated_card_is_not_run(card: Card) -> None:
    done = measured(card, program())
    result = json.loads(done.stdout)

    assert (done.returncode, result["verdict"]) == (4, "not run")
    assert result["reason"] == "no CUDA driver: this card is simulated"
    assert result["metrics"] == {}
    assert set(result["not_run"]) == set(gpubench.METRICS)


def test_simulated_driver_says_so_itself(card: Card) -> None:
    """Whatever NVML tells of the card."""
    result = json.loads(measured(card, program().replace('"simulated":', '"another":')).stdout)

    assert result["reason"] == ("no CUDA driver: operation not supported: this card is simulated and runs no code")
    assert result["metrics"] == {}


def test_simulated_card_in_use_is_not_run_either(card: Card) -> None:
    with card.client(100) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "0 0 0\n"
        assert json.loads(measured(card, program()).stdout)["verdict"] == "not run"

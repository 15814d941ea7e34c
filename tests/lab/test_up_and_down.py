# SPDX-License-Identifier: MIT
"""What the lab leaves behind: nothing, whenever it is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rehearsal import lab, paths, processes


def machine() -> dict[str, object]:
    """What the lab may touch outside of its own folder."""

    def lines(*words: str) -> list[str]:
        return sorted(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines())

    return {
        "forwarding": Path("/proc/sys/net/ipv4/ip_forward").read_text(),
        "links": [line.split(":")[1] for line in lines("ip", "-o", "link")],
        "routes": lines("ip", "route"),
        "tables": lines("nft", "list", "tables"),
        "mounts": [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()],
        "loops": lines("losetup", "--list", "--noheadings", "--output", "NAME"),
        "processes": processes.members(),
        "machines": sorted(path.name for path in Path("/run/systemd/nspawn").glob("propagate/*")),
    }


@pytest.fixture(autouse=True)
def no_lab() -> None:
    if lab.is_up():
        pytest.fail("a lab is up that these tests did not start: make lab-down")


def test_down_leaves_the_machine_as_it_was() -> None:
    lab.down()
    before = machine()
    lab.up()
    assert machine() != before
    lab.down()

    assert machine() == before
    assert not paths.lab().exists()


def test_second_up_says_that_the_lab_is_up(capfd: pytest.CaptureFixture[str]) -> None:
    lab.up()
    try:
        capfd.readouterr()
        lab.up()
        assert "the lab is up already" in capfd.readouterr().err
    finally:
        lab.down()


@pytest.mark.parametrize("seconds", [0.8, 1.6, 2.4])
def test_killed_up_is_cleared_by_the_next(seconds: float) -> None:
    lab.down()
    before = machine()
    killed = subprocess.Popen([sys.executable, "-m", "rehearsal", "up"], start_new_session=True)
    time.sleep(seconds)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()

    lab.up()
    lab.down()

    assert machine() == before

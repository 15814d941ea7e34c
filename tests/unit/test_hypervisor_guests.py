# SPDX-License-Identifier: MIT
"""The program that shuts guests down for a reboot and starts them again, run for real beside a stand-in `pvesh`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from operations.hypervisor.facts import SHUT_DOWN
from operations.hypervisor.restart import _GUESTS

#: Starts and stops what is asked, except for guests that have a file `stubborn/VMID`; the ids are in `--vms`.
PVESH = """#!/bin/sh
echo "$@" >> pvesh.log
cat var/lib/gpulab/shut-down-guests >> noted.log
ids=$(echo "$4" | tr , ' ')
for id in $ids; do
    [ -e stubborn/$id ] && continue
    case $2 in
        */stopall) rm -f run/qemu-server/$id.pid ;;
        */startall) echo 1 > run/qemu-server/$id.pid ;;
    esac
done
"""


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A folder with two running VMs and `pvesh`."""
    for name in ("bin", "run/qemu-server", "proc/1", "stubborn"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "bin/pvesh").write_text(PVESH)
    (tmp_path / "bin/pvesh").chmod(0o755)
    for vmid in (101, 102):
        (tmp_path / f"run/qemu-server/{vmid}.pid").write_text("1\n")
    return tmp_path


def act(node: Path, **argument: Any) -> subprocess.CompletedProcess[str]:
    argument |= {"root": str(node), "note": SHUT_DOWN}
    path = f"{node}/bin:/usr/bin:/bin"
    program = [sys.executable, "-c", _GUESTS, json.dumps(argument)]
    return subprocess.run(program, env={"PATH": path}, capture_output=True, text=True)


def noted(node: Path) -> str | None:
    note = node / SHUT_DOWN[1:]
    return note.read_text().strip() if note.exists() else None


def test_guests_are_noted_before_they_are_asked(node: Path) -> None:
    done = act(node, stop=[101, 102], timeout_s=90)

    assert done.returncode == 0, done.stderr
    assert (node / "pvesh.log").read_text() == (
        "create /nodes/localhost/stopall --vms 101,102 --force-stop 0 --timeout 90\n"
    )
    assert (node / "noted.log").read_text() == "101,102\n"
    assert noted(node) == "101,102"


def test_those_of_a_killed_run_stay_noted(node: Path) -> None:
    """101 was shut down by a run that never came to reboot."""
    act(node, stop=[101])
    act(node, stop=[102])

    assert noted(node) == "101,102"


def test_guest_that_does_not_shut_down_brings_the_others_back(node: Path) -> None:
    (node / "stubborn/102").touch()

    done = act(node, stop=[101, 102], timeout_s=5)

    assert done.returncode != 0
    assert "guests that did not shut down in 5 s: [102]; the others were started again" in done.stderr
    assert (node / "run/qemu-server/101.pid").exists()
    assert noted(node) is None


def test_guests_start_again_and_the_note_goes(node: Path) -> None:
    act(node, stop=[101, 102])
    done = act(node, start=[101, 102])

    assert done.returncode == 0
    assert (node / "pvesh.log").read_text().splitlines()[-1] == (
        "create /nodes/localhost/startall --vms 101,102 --force 1"
    )
    assert noted(node) is None


def test_pve_that_does_not_answer_yet_is_asked_again(node: Path) -> None:
    """SSH is up before the services of PVE are."""
    act(node, stop=[101, 102])
    (node / "bin/pvesh").write_text(f"#!/bin/sh\n[ -e asked ] || {{ touch asked; exit 111; }}\n{PVESH}")

    assert act(node, start=[101, 102]).returncode == 0
    assert noted(node) is None


def test_guest_that_does_not_start_stays_noted(node: Path) -> None:
    act(node, stop=[101, 102])
    (node / "stubborn/101").touch()

    done = act(node, start=[101, 102], timeout_s=0)

    assert done.returncode != 0 and "do not start: [101]" in done.stderr
    assert noted(node) == "101,102"

# SPDX-License-Identifier: MIT
"""The program that shuts guests down for a reboot and starts them again, run for real beside a stand-in `pvesh`."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from inventory import GpulabError
from operations.hypervisor import restart
from operations.hypervisor.facts import SHUT_DOWN

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
    program = [sys.executable, "-c", restart._PROGRAM, json.dumps(argument)]
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


@dataclass
class Commanded:
    """Stands in for a pyinfra host: notes what it is told, in order."""

    name: str
    log: list[str]
    fails: str = ""

    def run_shell_command(self, command: Any, **_: Any) -> tuple[bool, Any]:
        (action,) = {"stop", "start"} & set(json.loads(command.bits[3].obj))
        self.log.append(f"{self.name} {action}")
        output = SimpleNamespace(stderr="trying\nguests that did not shut down in 5 s: [101]")
        return action != self.fails, output


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens, in order; a reboot takes a moment."""
    happened: list[str] = []

    def reboot(host: Any, *_: Any) -> None:
        happened.append(f"{host.name} goes")
        time.sleep(0.05)
        happened.append(f"{host.name} is back")

    monkeypatch.setattr(restart, "reboot_and_wait", reboot)
    return happened


def test_guests_go_before_the_reboot_and_come_back_after_it(log: list[str]) -> None:
    restart._restart(Commanded("pve1", log), "lab", "id", 60, restart._Guests([101], 90))

    assert log == ["pve1 stop", "pve1 goes", "pve1 is back", "pve1 start"]


def test_node_whose_guests_do_not_shut_down_is_not_rebooted(log: list[str]) -> None:
    with pytest.raises(GpulabError, match=r"pve1: its guests are not shut down: guests that did not shut down in 5 s"):
        restart._restart(Commanded("pve1", log, fails="stop"), "lab", "id", 60, restart._Guests([101], 5))

    assert log == ["pve1 stop"]


@pytest.mark.parametrize(("clusters", "together"), [(("lab", "lab"), False), (("pve1", "pve2"), True)])
def test_nodes_of_one_cluster_reboot_one_after_the_other(
    log: list[str], clusters: tuple[str, str], together: bool
) -> None:
    started = threading.Barrier(2)

    def go(name: str, cluster: str) -> None:
        started.wait()
        restart._restart(Commanded(name, log), cluster, "id", 60, restart._Guests([], 0))

    threads = [threading.Thread(target=go, args=pair) for pair in zip(("pve1", "pve2"), clusters, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(log) == 4
    if not together:
        assert [line.split()[0] for line in log[:2]] in (["pve1"] * 2, ["pve2"] * 2)

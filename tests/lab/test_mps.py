# SPDX-License-Identifier: MIT
"""The real MPS daemon under systemd: its limits outlive a kill, a mistake and a boot; another user is kept out."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from inventory import GpulabError
from rehearsal import host

from .commands import INVENTORY

UNIT = "gpulab-mps.service"
GPU01 = ("--limit", "gpu01")
#: The declared limits, as the daemon tells them.
DECLARED = "80.0\n12G\n"


def control(deployed: Any, *commands: str) -> str:
    script = "printf '%s\\n' \"$@\" | nvidia-cuda-mps-control"
    words = ("env", "CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps", "timeout", "5", "sh", "-c", script, "control", *commands)
    return str(deployed.on("gpu01", *words))


def limits(deployed: Any) -> str:
    return control(deployed, "get_default_active_thread_percentage", "get_default_device_pinned_mem_limit 0")


def main_pid(deployed: Any) -> str:
    return str(deployed.on("gpu01", "systemctl", "show", "--property=MainPID", "--value", UNIT)).strip()


def until(answer: Callable[[], Any], wanted: Any) -> None:
    """Ask until it is as wanted, which systemd has its time for."""
    deadline, found = time.monotonic() + 120, None
    while time.monotonic() < deadline:
        try:
            if (found := answer()) == wanted:
                return
        except (AssertionError, GpulabError) as error:
            # Between two boots there is nobody to ask.
            found = error
        time.sleep(0.5)
    pytest.fail(f"{found!r}, expected {wanted!r}")


def healed(deployed: Any) -> None:
    """One deploy changes what is wrong, the next one nothing."""
    for _ in range(2):
        done = deployed.deploy(*GPU01)
        assert done.status == 0, done.output[-3000:]
    assert deployed.changed() == []


def test_daemon_that_is_killed_comes_back_with_its_limits_and_in_its_folder(deployed: Any) -> None:
    before = main_pid(deployed)
    folder = deployed.on("gpu01", "stat", "--format=%i %u %a", "/run/nvidia-mps")
    deployed.on("gpu01", "kill", "-9", before)

    until(lambda: main_pid(deployed) not in ("0", before), True)
    until(lambda: limits(deployed), DECLARED)
    # The containers have bound this very folder.
    assert deployed.on("gpu01", "stat", "--format=%i %u %a", "/run/nvidia-mps") == folder
    assert folder.split()[1:] == ["850", "700"]
    assert "control" in deployed.on("gpu01", "docker", "exec", "ollama", "ls", "/run/nvidia-mps")


def test_limits_changed_by_hand_are_healed_and_nobody_loses_the_daemon(deployed: Any) -> None:
    pid = main_pid(deployed)
    control(deployed, "set_default_active_thread_percentage 5", "set_default_device_pinned_mem_limit 0 1G")
    assert limits(deployed) == "5.0\n1G\n"

    healed(deployed)

    assert limits(deployed) == DECLARED
    assert main_pid(deployed) == pid


def test_card_changed_by_hand_is_healed(deployed: Any) -> None:
    deployed.on("gpu01", "nvidia-smi", "--power-limit=130", "--compute-mode=0")

    healed(deployed)

    query = ("nvidia-smi", "--query-gpu=power.limit,compute_mode", "--format=csv,noheader,nounits")
    assert deployed.on("gpu01", *query).strip() == "120.00, Exclusive_Process"


def test_client_of_another_user_is_refused_at_once(deployed: Any) -> None:
    script = "echo get_server_list | CUDA_MPS_PIPE_DIRECTORY=/run/nvidia-mps timeout 5 nvidia-cuda-mps-control"
    done = host.run("gpu01", ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script])

    assert done.returncode == 1
    assert "Cannot find MPS control daemon process" in done.stdout + done.stderr


def test_tenants_profile_is_taken_by_a_shell_and_by_docker(deployed: Any) -> None:
    path = "/etc/gpulab/tenants/astro.env"
    shell = deployed.on("gpu01", "sh", "-c", f"set -a; . {path}; env | grep CUDA_MPS_ | sort")
    image = deployed.on("gpu01", "docker", "inspect", "--format", "{{.Image}}", "ollama").strip()
    made = deployed.on("gpu01", "docker", "create", "--env-file", path, image).strip()
    try:
        listed = "{{range .Config.Env}}{{println .}}{{end}}"
        environment = deployed.on("gpu01", "docker", "inspect", "--format", listed, made).splitlines()
    finally:
        deployed.on("gpu01", "docker", "rm", made)
    assert sorted(line for line in environment if line.startswith("CUDA_MPS_")) == shell.splitlines()
    assert "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT=0=4096M" in shell.splitlines()


def test_hot_card_gets_less_power_and_the_deploy_leaves_it_alone(deployed: Any) -> None:
    def limit() -> str:
        query = ("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits")
        return str(deployed.on("gpu01", *query)).strip()

    faults = "/var/lib/lab-hardware/nvml.conf"
    deployed.on("gpu01", "sh", "-c", f"echo temperature_c=92 > {faults}")
    try:
        until(limit, "100.00")
        done = deployed.deploy(*GPU01)
        assert (done.status, deployed.changed()) == (0, []), done.output[-3000:]
    finally:
        deployed.on("gpu01", "rm", faults)
    until(limit, "120.00")
    said = deployed.on("gpu01", "journalctl", "--unit=gpulab-gpu-thermal.service", "--output=cat", "--no-pager")
    assert "92 °C, critical: power limit 120 W -> 110 W" in said


def test_everything_is_back_after_a_boot_without_a_deploy(deployed: Any) -> None:
    before = deployed.on("gpu01", "cat", "/proc/sys/kernel/random/boot_id")
    host.request_reboot("gpu01")
    until(lambda: deployed.on("gpu01", "cat", "/proc/sys/kernel/random/boot_id") != before, True)

    until(lambda: limits(deployed), DECLARED)
    query = ("nvidia-smi", "--query-gpu=power.limit,compute_mode", "--format=csv,noheader,nounits")
    until(lambda: deployed.on("gpu01", *query).strip(), "120.00, Exclusive_Process")
    until(lambda: "Up" in deployed.on("gpu01", "docker", "ps", "--filter=name=ollama", "--format={{.Status}}"), True)
    assert deployed.on("gpu01", "docker", "exec", "ollama", "id", "-u").strip() == "850"


def test_card_is_shared_in_turn_and_by_mps_again(deployed: Any, tmp_path: Path) -> None:
    other = tmp_path / "lab.py"
    text = Path(INVENTORY).read_text()
    other.write_text(re.sub(r'("power_limit_w": [0-9]+,)', r'\1 "sharing": "time-slice",', text))
    shutil.copytree("inventory/group_data", tmp_path / "group_data")

    done = deployed.pyinfra("deploy.py", "-y", *GPU01, lab=other)
    assert done.status == 0, done.output[-3000:]
    assert deployed.on("gpu01", "sh", "-c", f"systemctl is-active {UNIT} || true; ls -d /run/nvidia-mps || true") == (
        "inactive\n"
    )
    described = "{{.Config.User}} {{.HostConfig.IpcMode}}"
    assert deployed.on("gpu01", "docker", "inspect", "--format", described, "ollama") == "0:0 private\n"
    models = ("stat", "--format=%u", "/srv/data/ollama/models/blobs")
    assert deployed.on("gpu01", *models).strip() == "0"

    healed(deployed)

    assert limits(deployed) == DECLARED
    assert deployed.on("gpu01", *models).strip() == "850"
    done, failed = deployed.verify(*GPU01)
    assert (done.status, failed) == (0, set()), done.output[-3000:]

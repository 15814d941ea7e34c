# SPDX-License-Identifier: MIT
"""Break one promise by hand: verify fails at exactly the checks that say so, and one deploy heals it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from rehearsal import host
from tests.lab.leaks import LEAST


def test_converged_lab_verifies_and_changes_nothing(deployed: Any) -> None:
    done, failed = deployed.verify()
    assert (done.status, failed) == (0, set()), done.output[-3000:]

    again = deployed.deploy()
    assert again.status == 0, again.output[-3000:]
    assert deployed.changed() == []


def test_plan_of_a_converged_lab_is_empty(deployed: Any) -> None:
    done = deployed.plan()

    assert done.status == 0
    assert "plan: 0 changes, 0 reboots" in done.output
    assert done.output.count("nothing to change") == 4


def heals(deployed: Any, expected: set[str]) -> None:
    """verify fails at exactly `expected`; after one deploy it fails nowhere."""
    _, failed = deployed.verify()
    assert failed == expected

    done = deployed.deploy()
    assert done.status == 0, done.output[-3000:]
    done, failed = deployed.verify()
    assert (done.status, failed) == (0, set()), done.output[-3000:]


def test_stopped_ollama(deployed: Any) -> None:
    deployed.on("gpu01", "docker", "stop", "ollama")

    # The proxy lets its tenants in, and then there is nobody to answer.
    heals(deployed, {"containers.ollama.running[gpu01]", "containers.ollama.token.accepted[gpu01]"})


def test_edited_binding_script(deployed: Any) -> None:
    """The card is still bound; the next boot would not bind it."""
    deployed.on("pve1", "sed", "-i", "s/10de:24b0/10de:ffff/", "/etc/initramfs-tools/scripts/init-top/gpulab-vfio")
    deployed.on("pve1", "update-initramfs", "-u", "-k", "all")

    heals(deployed, {"hypervisor.next_boot.initramfs[pve1]"})


def test_unloaded_driver(deployed: Any) -> None:
    """Nobody can unload a module that is in use, so its users are stopped first, and who would start them again."""
    # With its timer alone, a look that has begun would go on.
    deployed.on("gpu01", "systemctl", "stop", "gpulab-heal.timer", "gpulab-heal.service")
    deployed.on("gpu01", "docker", "stop", "ollama", "milvus")
    deployed.on("gpu01", "systemctl", "stop", "nvidia-persistenced", "gpulab-gpu-thermal", "gpulab-mps")
    deployed.on("gpu01", "rmmod", "nvidia_uvm", "nvidia")

    # Whether containers run can't be judged without the card; that nobody answers behind the proxy can.
    heals(deployed, {"nvidia.driver.loaded[gpu01]", "containers.ollama.token.accepted[gpu01]"})


def test_revoked_token(deployed: Any) -> None:
    from rehearsal.rehearse import bootstrap

    deployed.on("pve1", "pveum", "user", "token", "remove", "gpulab@pve", "gpulab")
    try:
        _, failed = deployed.verify()
        assert failed == {"vm.api.reachable[pve1]"}

        done = deployed.deploy()
        assert done.status == 1
        assert "the API refuses the token" in done.output
    finally:
        bootstrap()
    heals(deployed, set())


def test_guest_that_runs_and_cannot_be_reached_fails_the_plan(deployed: Any) -> None:
    deployed.on("gpu01", "systemctl", "stop", "ssh.socket", "ssh.service")
    try:
        # The guest gets its boot time first; the lab's guests have been up for longer than a short one.
        done = deployed.plan("--data", "boot_timeout_s=10")
        assert done.status == 1
        assert "gpu01 runs (VM 101 on pve1) and cannot be reached" in done.output
        assert "create VM" not in done.output
    finally:
        deployed.on("gpu01", "systemctl", "start", "ssh.service")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("vmdi=101", "vmdi = 101: unknown key; did you mean `vmid`?"),
        ("vmid=gpu", "vmid = 'gpu': expected a valid integer"),
        ("memory_mib=lots", "memory_mib = 'lots': expected a valid integer"),
    ],
)
def test_wrong_inventory_changes_nothing(deployed: Any, word: str, message: str) -> None:
    done = deployed.deploy("--data", word)

    assert done.status == 1
    assert message in done.output
    assert "Connecting to hosts" not in done.output
    assert "Traceback" not in done.output


def test_limit_without_a_match_is_refused(deployed: Any) -> None:
    done = deployed.deploy("--limit", "gpu99")

    assert done.status == 1
    assert "--limit matches no host" in done.output


def test_killed_deploy_can_be_run_again(deployed: Any) -> None:
    deployed.on("gpu01", "docker", "rm", "--force", "ollama")
    deployed.on("gpu01", "sh", "-c", "rm -f /etc/docker/daemon.json /etc/apt/preferences.d/gpulab-nvidia*")
    for seconds in (1.5, 3.0):
        deployed.killed(seconds, "deploy.py", "-y", "--limit", "gpu01")
    heals(deployed, deployed.verify()[1])


def test_secret_stands_nowhere(deployed: Any) -> None:
    from pathlib import Path

    from inventory.secrets import Secrets
    from rehearsal import paths

    secrets = Secrets(paths.lab() / "state").values()
    assert secrets
    # Of a token only what follows its name: the name is no secret.
    words = [value.rpartition("=")[2] for value in secrets]
    assert all(len(word) >= LEAST for word in words)
    outputs = [deployed.pyinfra("deploy.py", "-vvv", "-y", "--diff").output, deployed.plan("-vvv").output]
    outputs += [deployed.pyinfra("debug-inventory").output, deployed.verify("-vv")[0].output]
    outputs += [path.read_text() for path in Path(deployed.reports).rglob("*") if path.is_file()]
    for text in outputs:
        assert not any(word in text for word in words)


def test_guest_comes_back_whole_from_a_reboot(deployed: Any) -> None:
    """Driver, data disk, CDI and Ollama are there again without a deploy."""
    before = deployed.on("gpu01", "cat", "/proc/sys/kernel/random/boot_id")
    host.request_reboot("gpu01")
    deadline = time.monotonic() + 120
    failed: set[str] = {"not yet"}
    while failed and time.monotonic() < deadline:
        _, failed = deployed.verify("--limit", "gpu01")

    assert failed == set()
    assert deployed.on("gpu01", "cat", "/proc/sys/kernel/random/boot_id") != before


def test_broken_node_stops_only_its_own_guest(deployed: Any, spoilt: None) -> None:
    """Last of this file: the second node does not come back."""
    host.stop("pve2", 10)

    done = deployed.deploy()

    assert done.status == 1
    assert "waits for pve2" in done.output
    hosts = {line["host"]: line["failed"] for line in deployed.record() if line["kind"] == "host"}
    assert hosts == {"pve1": False, "gpu01": False}

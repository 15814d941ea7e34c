# SPDX-License-Identifier: MIT
"""Draining the card under a real systemd: what was stopped is started again, whoever is killed. In a lab of its own.

The services are units; `docker` is a stand-in, and so is the driver's library, which takes its time to load.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal import host, image, lab, machine, network, paths
from rehearsal.host import HostSpec
from verify.benchmarks import program

pytestmark = pytest.mark.lab
NAME, SUBNET = "drain01", "10.66.97.0/24"
PROGRAM = "/root/gpubench.py"
STATE = "/var/lib/gpulab/bench/drained.json"
DOCKER = """#!/bin/sh
for name; do :; done
case "$1" in
inspect) systemctl is-active --quiet "stand-in-$name" && echo true || echo false;;
*) exec systemctl "$1" "stand-in-$name";;
esac
"""
UNITS = {
    "stand-in-milvus.service": "[Service]\nExecStart=sleep infinity\n",
    "heal.service": "[Service]\nType=oneshot\nExecStart=systemctl start stand-in-milvus\n",
    "heal.timer": "[Timer]\nOnActiveSec=1\nOnUnitActiveSec=1\nAccuracySec=100ms\n",
}
#: Loading it takes as long as a run; then there is no driver.
LIBRARY = """
#include <unistd.h>
__attribute__((constructor)) static void wait(void) { sleep(%d); }
"""
DRAIN = f"python3 {PROGRAM} --drain --quick --container=milvus --unit=heal.timer"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostSpec]:
    machine.check()
    ready = image.ensure().parent.parent
    folder = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPULAB_CACHE", str(folder))
        patch.setenv("GPULAB_SUBNET", SUBNET)
        (folder / "image").symlink_to(ready)
        try:
            yield started(folder)
        finally:
            lab.down()


def started(folder: Path) -> HostSpec:
    net = network.current()
    network.up(net)
    paths.lab().mkdir(exist_ok=True)
    (folder / "slow.c").write_text(LIBRARY % 5)
    library = paths.lab() / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", str(folder / "slow.c"), "-o", str(library)], check=True)
    files = {
        PROGRAM: (program(), 0o644),
        "/usr/local/bin/docker": (DOCKER, 0o755),
        **{f"/etc/systemd/system/{name}": (text, 0o644) for name, text in UNITS.items()},
    }
    spec = HostSpec(
        name=NAME,
        address=net.address(101),
        gateway=net.gateway,
        lower=image.root(),
        upper=paths.lab() / "disks" / "101",
        binds=[f"{paths.lab()}:/mnt"],
        files=files,
    )
    host.start(spec)
    booted()
    sh("cp /mnt/libcuda.so.1 /usr/local/lib/; ldconfig")
    return spec


def booted() -> None:
    wait("systemctl is-system-running --wait | grep -qx running", 60)


def sh(script: str) -> str:
    done = host.run(NAME, ["sh", "-c", script], timeout=120)
    return done.stdout


def wait(script: str, limit_s: float) -> None:
    """Until the script succeeds."""
    end = time.monotonic() + limit_s
    while host.run(NAME, ["sh", "-c", script], timeout=120).returncode:
        assert time.monotonic() < end, script
        time.sleep(0.1)


UP = "systemctl is-active --quiet stand-in-milvus heal.timer"
DOWN = "! systemctl is-active --quiet stand-in-milvus && ! systemctl is-active --quiet heal.timer"
BENCH = "systemctl show --property=MainPID --value gpulab-bench.service"


@pytest.fixture(autouse=True)
def services(guest: HostSpec) -> None:
    sh("systemctl start stand-in-milvus heal.timer")
    wait(UP, 10)


def test_services_are_down_during_the_run_and_up_after_it() -> None:
    sh(f"systemd-run --unit=front --collect sh -c '{DRAIN} > /root/result.json 2> /root/errors'")
    wait(DOWN, 10)
    # The timer fires each second, and would start it again.
    time.sleep(2.5)
    assert sh(f"{DOWN}; echo $?") == "0\n"
    wait(f"test -s /root/result.json && {UP}", 30)
    result = json.loads(sh("cat /root/result.json"))

    assert result["verdict"] != "failed", result
    assert result["notes"] == ["stopped for this run, and back: heal.timer, milvus"]
    assert sh(f"test -e {STATE} || echo gone") == "gone\n"


@pytest.mark.parametrize(
    "victims",
    [
        f"$({BENCH})",
        # This program as the person called it, and the systemd-run that it waits for.
        "$(systemctl show --property=MainPID --value front) $(pgrep -x systemd-run)",
        f"$(systemctl show --property=MainPID --value front) $(pgrep -x systemd-run) $({BENCH})",
    ],
    ids=["benchmarks", "caller", "all"],
)
def test_kill_does_not_keep_services_down(victims: str) -> None:
    sh(f"systemd-run --unit=front --collect {DRAIN}")
    wait(DOWN, 10)
    # The benchmarks themselves have begun.
    wait(f"test $({BENCH}) -gt 0", 10)
    assert sh(f"kill -9 {victims} && echo killed") == "killed\n"
    wait(UP, 30)
    wait(f"test ! -e {STATE}", 10)


def test_kill_between_two_stops_does_not_keep_services_down() -> None:
    """The step that stops them is killed: one is down, the other is not."""
    sh("mkdir -p /run/systemd/system/stand-in-milvus.service.d")
    slow = "[Service]\\nExecStop=sleep 5\\n"
    sh(f"printf '{slow}' > /run/systemd/system/stand-in-milvus.service.d/slow.conf; systemctl daemon-reload")
    try:
        sh(f"systemd-run --unit=front --collect {DRAIN}")
        wait("! systemctl is-active --quiet heal.timer", 10)
        control = "systemctl show --property=ControlPID --value gpulab-bench.service"
        assert sh(f"kill -9 $({control}) && echo killed") == "killed\n"
        wait(UP, 30)
        wait(f"test ! -e {STATE}", 10)
    finally:
        sh("rm -r /run/systemd/system/stand-in-milvus.service.d; systemctl daemon-reload")


def test_power_cut_leaves_what_restore_needs(guest: HostSpec) -> None:
    sh(f"systemd-run --unit=front --collect {DRAIN}")
    wait(DOWN, 10)
    wait(f"test $({BENCH}) -gt 0", 10)
    # Nothing of the guest's gets another turn.
    host.stop(NAME, timeout=0)
    host.start(guest)
    booted()

    assert sh(f"{DOWN} && cat {STATE}") == '{"containers": {"milvus": true}, "units": {"heal.timer": true}}'
    sh(f"python3 {PROGRAM} --restore")
    assert sh(f"{UP} && test ! -e {STATE} && echo restored") == "restored\n"

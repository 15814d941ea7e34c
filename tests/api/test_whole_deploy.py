# SPDX-License-Identifier: MIT
"""deploy.py as a whole, through pyinfra's own command line, on `@fake` nodes and a real API double."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Bench

HOSTS = Path(__file__).parent.parent / "hosts"
ROOT = Path(__file__).parents[2]


def pyinfra(bench: Bench, *words: str, lab: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run it with a node that answers what `tests/hosts/pve1.yaml` says: a fresh one."""
    state = yaml.safe_load((HOSTS / "pve1.yaml").read_text())
    responses = {
        "boot-refreshed": json.dumps(state),
        '"places"': json.dumps(
            {"0000:01:00": {"path": "0000:01:00", "id": "10de:24b0", "subsystem_id": "10de:14ad", "iommu_group": 14}}
        ),
        "/cluster/backup": "[]",
        '"paths"': json.dumps({"/var/lib/vz/snippets/gpulab-vendor.yaml": None}),
    }
    path = bench.folder / "lab.py"
    text = lab or path.read_text()
    fake = f"'fake_responses': {responses!r}, 'fake_delay': 0, 'fake_delay_jitter': 0, 'ssh_hostname'"
    path.write_text(text.replace("'ssh_hostname'", fake, 1))
    program = [sys.executable, str(ROOT / "tests/api/fake_pyinfra.py"), str(path), "deploy.py", *words]
    return subprocess.run(
        program,
        cwd=ROOT,
        env={**os.environ, "GPULAB_RUNS": str(bench.folder / "runs"), "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_plan_of_a_bare_lab_shows_everything_and_creates_nothing(api: Any, bench: Bench) -> None:
    done = pyinfra(bench, "--dry")

    assert done.returncode == 0, done.stderr
    for line in (
        "file /etc/initramfs-tools/scripts/init-top/gpulab-vfio",
        "update-initramfs -u -k all",
        "reboot: yes (iommu=pt is not on the running command line",
        "mapping a4000",
        "create VM 101 on pve1 (assumed)",
        "start gpu01 (assumed)",
        "install the NVIDIA driver (assumed)",
        "file /etc/docker/daemon.json (assumed)",
    ):
        assert line in done.stderr, done.stderr
    assert api.api().nodes("pve1").qemu.get() == []
    assert api.api().cluster.mapping.pci.get() == []
    assert {method for method, _ in api.requests} == {"GET"}


def test_refused_node_is_named_and_the_plan_fails(api: Any, bench: Bench) -> None:
    lab = (bench.folder / "lab.py").read_text().replace("0000:01:00", "0000:81:00")
    done = pyinfra(bench, "--dry", lab=lab)

    assert done.returncode == 1
    assert "refused: pve1: no PCI device 0000:81:00" in done.stderr
    assert "Traceback" not in done.stderr


def test_guest_waits_for_its_refused_node(api: Any, bench: Bench) -> None:
    lab = (bench.folder / "lab.py").read_text().replace("0000:01:00", "0000:81:00")
    done = pyinfra(bench, "-y", lab=lab)

    assert done.returncode == 1
    assert "waits for pve1: no PCI device 0000:81:00" in done.stderr
    assert api.api().nodes("pve1").qemu.get() == []


def test_wrong_inventory_is_one_block_before_any_connection(api: Any, bench: Bench) -> None:
    lab = (bench.folder / "lab.py").read_text().replace("'vmid'", "'vmdi'")
    done = pyinfra(bench, "-y", lab=lab)

    assert done.returncode == 1
    assert "gpu01: vmdi = 101: unknown key; did you mean `vmid`?" in done.stderr
    assert "Connecting to hosts" not in done.stderr
    assert "Traceback" not in done.stderr
    assert api.requests == []


@pytest.mark.parametrize("words", [("--dry", "-vvv"), ("-y", "-vvv", "--diff")])
def test_token_stands_in_no_output_and_no_record(api: Any, bench: Bench, words: tuple[str, ...]) -> None:
    done = pyinfra(bench, *words)

    assert "Check the token's rights" in done.stderr
    assert "Traceback" not in done.stderr
    written = [path.read_text() for path in (bench.folder / "runs").glob("*.jsonl")]
    assert written
    for text in (done.stdout, done.stderr, *written):
        assert api.token not in text


def test_record_says_who_what_and_how_much(api: Any, bench: Bench) -> None:
    pyinfra(bench, "-y", lab=(bench.folder / "lab.py").read_text().replace("0000:01:00", "0000:81:00"))

    path = max((bench.folder / "runs").glob("*.jsonl"))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    run = lines[0]
    assert (run["kind"], run["hosts"]) == ("run", ["pve1", "gpu01"])
    failed = {line["host"]: line["error"] for line in lines if line["kind"] == "operation" and line["error"]}
    assert failed["pve1"].startswith("pve1: no PCI device 0000:81:00")
    assert failed["gpu01"].startswith("waits for pve1")
    assert {line["host"] for line in lines if line["kind"] == "host"} == {"pve1", "gpu01"}

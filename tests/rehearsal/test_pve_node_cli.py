# SPDX-License-Identifier: MIT
"""pveum, qm, pvesm and pvesh of a rehearsal node, run as a node would against a front."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rehearsal.pve import node_cli
from rehearsal.pve.testing import FakeLab

Shell = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def lab() -> Iterator[FakeLab]:
    with FakeLab() as lab:
        yield lab


@pytest.fixture
def shell(lab: FakeLab, tmp_path: Path) -> Shell:
    """Runs `TOOL WORDS…` with the node's settings pointing at the front."""
    lab.reset()
    settings = tmp_path / "front.json"
    settings.write_text(json.dumps({"node": "pve1", "url": lab.url, "secret": lab.node_secret, "ca": str(lab.ca)}))
    program = Path(node_cli.__file__).read_text().replace(node_cli.SETTINGS, str(settings))

    def run(tool: str, *words: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / tool
        script.write_text(program)
        return subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True, check=False)

    return run


def test_bootstrap_on_the_node(lab: FakeLab, shell: Shell) -> None:
    """Role, user, rule and token as `make bootstrap` makes them; the token's value comes once, as JSON."""
    assert shell("pveum", "role", "add", "Small", "--privs", "VM.Audit VM.Allocate").returncode == 0
    assert shell("pveum", "user", "add", "auto@pve", "--comment", "two words").returncode == 0
    assert shell("pveum", "acl", "modify", "/vms", "--users", "auto@pve", "--roles", "Small").returncode == 0
    words = ("user", "token", "add", "auto@pve", "iac", "--privsep", "0", "--output-format", "json")
    token = json.loads(shell("pveum", *words).stdout)
    assert lab.api(token["value"], "auto@pve", "iac").access.permissions.get(path="/vms") == {
        "/vms": {"VM.Allocate": 1, "VM.Audit": 1}
    }
    again = shell("pveum", *words)
    assert again.returncode == 255
    assert again.stderr == "400 Parameter verification failed.\ntokenid: Token already exists.\n"
    assert shell("pveum", "user", "token", "remove", "auto@pve", "iac").returncode == 0
    assert json.loads(shell("pveum", "user", "token", "list", "auto@pve", "--output-format", "json").stdout) == []


def test_qm_sets_and_removes_what_only_root_may(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, memory="2048")
    done = shell("qm", "set", "101", "--affinity", "0-3", "--hugepages", "1024")
    assert done.stdout == "update VM 101: -affinity 0-3 -hugepages 1024\n"
    assert "affinity: 0-3\n" in shell("qm", "config", "101").stdout
    shell("qm", "set", "101", "--delete", "affinity")
    assert "affinity" not in shell("qm", "config", "101").stdout
    missing = shell("qm", "config", "102")
    assert missing.returncode == 255
    assert missing.stderr == "Configuration file 'nodes/pve1/qemu-server/102.conf' does not exist\n"


def test_qm_unlocks_and_destroys_a_creation_that_was_cut_off(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, lock="create")
    assert shell("qm", "destroy", "101").stderr == "VM is locked (create)\n"
    assert shell("qm", "unlock", "101").returncode == 0
    assert shell("qm", "destroy", "101", "--purge").returncode == 0
    assert lab.state.vms == {}


def test_pvesm_sets_content_and_pvesh_shows_it(shell: Shell) -> None:
    assert shell("pvesm", "set", "local", "--content", "iso,import,snippets").returncode == 0
    storages = json.loads(shell("pvesh", "get", "/storage", "--output-format", "json").stdout)
    assert next(s for s in storages if s["storage"] == "local")["content"] == "import,iso,snippets"


def test_stopall_and_startall_follow_the_node(lab: FakeLab, shell: Shell) -> None:
    """What pve-guests.service runs around a node's reboot."""
    lab.add_vm(101, running=True, onboot=1)
    lab.add_vm(102, running=True)
    assert shell("pvesh", "create", "/nodes/localhost/stopall").returncode == 0
    assert lab.power.started == {}
    upid = shell("pvesh", "create", "/nodes/localhost/startall").stdout.strip()
    lab.wait(upid)
    assert list(lab.power.started) == [101]


def test_wrong_secret_is_refused(lab: FakeLab, shell: Shell, tmp_path: Path) -> None:
    shell("qm", "list")
    settings = tmp_path / "front.json"
    settings.write_text(settings.read_text().replace(lab.node_secret, "guess"))
    refused = shell("qm", "list")
    assert (refused.returncode, refused.stderr) == (255, "Authentication failed!\n")

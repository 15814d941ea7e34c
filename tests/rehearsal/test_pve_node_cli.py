# SPDX-License-Identifier: MIT
"""pveum, qm, pvesm and pvesh of a rehearsal node, run as a node would against a front."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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


def log_of(lab: FakeLab, kind: str) -> list[str]:
    """The log of the one task of this kind."""
    (task,) = [task for task in lab.state.tasks if task.type == kind]
    return task.log


def test_stopall_and_startall_keep_to_the_guests_that_are_named(lab: FakeLab, shell: Shell) -> None:
    for vmid in (101, 102, 103):
        lab.add_vm(vmid, running=True)
    words = ("/nodes/localhost/stopall", "--vms", "101,103", "--force-stop", "0", "--timeout", "20")
    assert shell("pvesh", "create", *words).returncode == 0
    assert list(lab.power.started) == [102]
    assert log_of(lab, "stopall") == [
        "Stopping VM 103 (timeout = 20 seconds)",
        "Stopping VM 101 (timeout = 20 seconds)",
        "TASK OK",
    ]
    assert shell("pvesh", "create", "/nodes/localhost/startall", "--vms", "101").returncode == 0
    assert list(lab.power.started) == [102]
    assert shell("pvesh", "create", "/nodes/localhost/startall", "--vms", "101", "--force", "1").returncode == 0
    assert sorted(lab.power.started) == [101, 102]


def test_stopall_without_force_leaves_a_stubborn_guest_running(lab: FakeLab, shell: Shell) -> None:
    """Its own task says so; the one for all ends well, as in PVE."""
    lab.add_vm(101, running=True)
    lab.add_vm(102, running=True)
    lab.power.stubborn.add(101)
    done = shell("pvesh", "create", "/nodes/localhost/stopall", "--force-stop", "0", "--timeout", "1")
    assert done.returncode == 0
    assert list(lab.power.started) == [101]
    ended = {task.id: task.exitstatus for task in lab.state.tasks if task.type == "qmshutdown"}
    assert ended == {"101": "VM quit/powerdown failed - got timeout", "102": "OK"}


def test_stopall_stops_a_stubborn_guest_by_default(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, running=True)
    lab.power.stubborn.add(101)
    assert shell("pvesh", "create", "/nodes/localhost/stopall").returncode == 0
    assert lab.power.started == {}
    assert log_of(lab, "stopall")[0] == "Stopping VM 101 (timeout = 180 seconds)"
    assert "VM still running - terminating now with SIGTERM" in log_of(lab, "qmshutdown")


def test_guests_start_in_their_order_and_stop_in_reverse(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, onboot=1)
    lab.add_vm(102, onboot=1, startup="order=2,down=7")
    lab.add_vm(103, onboot=1, startup="1")
    lab.add_vm(104, onboot=1)
    lab.add_vm(105, onboot=1, template=1)
    assert shell("pvesh", "create", "/nodes/localhost/startall").returncode == 0
    assert log_of(lab, "startall")[:-1] == [f"Starting VM {vmid}" for vmid in (103, 102, 101, 104)]
    assert shell("pvesh", "create", "/nodes/localhost/stopall", "--timeout", "30").returncode == 0
    assert log_of(lab, "stopall")[:-1] == [
        "Stopping VM 104 (timeout = 30 seconds)",
        "Stopping VM 101 (timeout = 30 seconds)",
        "Stopping VM 102 (timeout = 7 seconds)",
        "Stopping VM 103 (timeout = 30 seconds)",
    ]


def test_guest_of_a_later_order_starts_when_the_earlier_has_started(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, onboot=1, startup="order=1")
    lab.add_vm(102, onboot=1, startup="order=2")
    lab.power.start_gate.clear()
    upid = lab.root().nodes("pve1").startall.post()
    deadline = time.monotonic() + 10
    while not lab.emulator.tasks.find(upid).log and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lab.emulator.tasks.find(upid).log == ["Starting VM 101"]
    lab.power.start_gate.set()
    assert lab.wait(upid) == "OK"
    assert list(lab.power.started) == [101, 102]


def test_startall_names_a_guest_that_does_not_start(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, onboot=1)
    lab.power.fail_start = "start failed: QEMU exited with code 1"
    assert shell("pvesh", "create", "/nodes/localhost/startall").returncode == 0
    assert "Starting VM 101 failed: start failed: QEMU exited with code 1" in log_of(lab, "startall")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--timeout", "7201", "timeout: value must have a maximum value of 7200"),
        ("--vms", "101,web", "vms: invalid format - value does not look like a valid VM ID list: 101,web"),
    ],
)
def test_stopall_refuses_bad_parameters(lab: FakeLab, shell: Shell, option: str, value: str, message: str) -> None:
    refused = shell("pvesh", "create", "/nodes/localhost/stopall", option, value)
    assert (refused.returncode, refused.stderr) == (255, f"400 Parameter verification failed.\n{message}\n")


def test_operator_may_switch_the_guests_that_it_may_switch(lab: FakeLab, shell: Shell) -> None:
    """Without VM.PowerMgmt on / each guest must be named."""
    lab.add_vm(101, running=True)
    with pytest.raises(Exception, match="403"):
        lab.api().nodes("pve1").stopall.post()
    lab.wait(lab.api().nodes("pve1").stopall.post(vms="101"))
    assert lab.power.started == {}
    other = lab.add_token("other@pve", "one", privsep=False)
    lab.grant("other@pve", "/vms/101", "VM.PowerMgmt")
    with pytest.raises(Exception, match="403"):
        lab.api(other, "other@pve", "one").nodes("pve1").startall.post(vms="101,102")


def test_wrong_secret_is_refused(lab: FakeLab, shell: Shell, tmp_path: Path) -> None:
    shell("qm", "list")
    settings = tmp_path / "front.json"
    settings.write_text(settings.read_text().replace(lab.node_secret, "guess"))
    refused = shell("qm", "list")
    assert (refused.returncode, refused.stderr) == (255, "Authentication failed!\n")


# Backups.


def test_vzdump_and_qmrestore_print_what_their_workers_say(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, memory="2048", scsi0="local-lvm:vm-101-disk-0,size=32G", net0="virtio=BC:24:11:AA:BB:CC")
    done = shell("vzdump", "101", "--storage", "local", "--compress", "zstd", "--protected")
    assert done.returncode == 0
    assert "INFO: Backup job finished successfully\n" in done.stdout
    listed = shell(
        "pvesh", "get", "/nodes/pve1/storage/local/content", "--content", "backup", "--output-format", "json"
    )
    (entry,) = json.loads(listed.stdout)
    assert entry["protected"] == 1
    done = shell("qmrestore", entry["volid"], "901", "--storage", "local-lvm", "--unique")
    assert done.returncode == 0
    assert "new volume ID is 'local-lvm:vm-901-disk-0'\n" in done.stdout
    assert lab.state.vms[901].config["net0"] != "virtio=BC:24:11:AA:BB:CC"
    again = shell("qmrestore", entry["volid"], "901", "--storage", "local-lvm")
    assert again.returncode == 255
    assert again.stderr == "unable to restore VM 901 - VM 901 already exists on node 'pve1'\n"


def test_a_vzdump_that_fails_says_so_with_its_log(lab: FakeLab, shell: Shell) -> None:
    done = shell("vzdump", "999", "--storage", "local")
    assert (done.returncode, done.stderr) == (255, "job errors\n")
    assert "ERROR: Backup of VM 999 failed - unable to find VM '999'\n" in done.stdout
    done = shell("vzdump", "--storage", "local")
    assert done.stderr == "400 Parameter verification failed.\nvmid: property is missing\n"


def test_pvesh_keeps_backup_jobs(lab: FakeLab, shell: Shell) -> None:
    job = ("--id", "nightly", "--vmid", "101", "--storage", "local", "--prune-backups", "keep-daily=7")
    assert shell("pvesh", "create", "/cluster/backup", *job, "--schedule", "03:00").returncode == 0
    assert shell("pvesh", "set", "/cluster/backup/nightly", "--enabled", "0").returncode == 0
    (found,) = json.loads(shell("pvesh", "get", "/cluster/backup", "--output-format", "json").stdout)
    assert (found["id"], found["schedule"], found["enabled"]) == ("nightly", "03:00", 0)
    assert shell("pvesh", "delete", "/cluster/backup/nightly").returncode == 0
    assert lab.state.backup_jobs == {}
    assert shell("pvesh", "get", "/cluster/backup/nightly").stderr == (
        "400 Parameter verification failed.\nid: No such job 'nightly'\n"
    )


def test_guest_exec_waits_as_long_as_it_is_told(lab: FakeLab, shell: Shell) -> None:
    lab.add_vm(101, running=True, agent="1")
    lab.power.answers["cat", "large"] = (3, b"x" * 500_000)
    ended = json.loads(shell("qm", "guest", "exec", "101", "--timeout", "0", "--", "cat", "large").stdout)
    assert (ended["exited"], ended["exitcode"], len(ended["out-data"])) == (1, 3, 500_000)
    done = shell("qm", "guest", "exec", "101", "--synchronous", "0", "--", "true")
    assert (set(json.loads(done.stdout)), done.stderr) == ({"pid"}, "")
    held = threading.Event()

    def run(vmid: int, argv: Sequence[str], stdin: bytes) -> subprocess.CompletedProcess[bytes]:
        held.wait(30)
        return subprocess.CompletedProcess(list(argv), 0, b"", b"")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.power, "run", run)
        done = shell("qm", "guest", "exec", "101", "--timeout", "1", "--", "sleep", "9")
        held.set()
    assert (set(json.loads(done.stdout)), done.stderr) == ({"pid"}, "timeout reached, returning pid\n")

# SPDX-License-Identifier: MIT
"""The API client on bad days: what the user sees, and that nothing is sent twice."""

from __future__ import annotations

import logging
import re
import threading
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import inventory
from inventory import GpulabError, Node
from operations.proxmox import client as client_module
from operations.proxmox import errors
from operations.proxmox.client import Client, with_digest
from operations.proxmox.errors import (
    AlreadyExists,
    ApiError,
    ApiUnreachable,
    DigestMismatch,
    InvalidParameter,
    Locked,
    NotFound,
    PermissionDenied,
    Request,
    RootOnly,
    TaskFailed,
    TaskUnfinished,
    Unauthorized,
)
from rehearsal import ca
from verify.vm import api as verify_api

from .conftest import Bench

VM = ("nodes", "pve1", "qemu", 101)
CONFIG = (*VM, "config")
MISSING = "Configuration file 'nodes/pve1/qemu-server/101.conf' does not exist"

# PVE's own words, each with what it means; from ../shared/data/pve-transcripts.txt and the notes of PVE 8.4 and 9.2.
PVF = "Parameter verification failed."
NODE_LOCK = "can't lock file '/var/lock/qemu-server/lock-101.conf' - got timeout"
STORAGE_LOCK = "cfs-lock 'storage-local' error: got lock request timeout"
ONE_OF = (
    "VM.Config.Disk|VM.Config.CDROM|VM.Config.CPU|VM.Config.Memory|VM.Config.Network|"
    "VM.Config.HWType|VM.Config.Options|VM.Config.Cloudinit"
)
WORDS: list[tuple[int, str, dict[str, Any] | None, type[ApiError]]] = [
    (500, "unable to create VM 101 - VM 101 already exists on node 'pve'", None, AlreadyExists),
    (500, "create hardware mapping failed: pci ID 'a4000' already defined", None, AlreadyExists),
    (500, "snapshot name 's1' already used", None, AlreadyExists),
    (500, "checksum mismatch (file change by other user?)", None, DigestMismatch),
    (
        500,
        "update hardware mapping failed: detected modified configuration - file changed by other user? Try again.",
        None,
        DigestMismatch,
    ),
    (500, MISSING, None, NotFound),
    (500, "pci mapping 'a4000' not found", None, NotFound),
    (500, "storage 'fast' does not exist", None, NotFound),
    (500, "VM is locked (backup)", None, Locked),
    (500, "VM is locked (snapshot-delete)", None, Locked),
    (500, NODE_LOCK, None, Locked),
    (500, STORAGE_LOCK, None, Locked),
    (500, "only root can set 'hugepages' config", None, RootOnly),
    (500, "only root can set 'affinity' config", None, RootOnly),
    (500, "only root can set 'hostpci0' config for non-mapped devices", None, RootOnly),
    (403, "only root can set 'affinity' config", None, RootOnly),
    (403, "Permission check failed (user != root@pam)", None, RootOnly),
    (500, "Only root can pass arbitrary filesystem paths. at .../PVE/Storage.pm line 651.", None, RootOnly),
    (500, "Only root can pass arbitrary filesystem paths. at .../PVE/Storage.pm line 581.", None, RootOnly),
    (400, PVF, {"hostpci0": "only root@pam can set 'romfile' option"}, RootOnly),
    (400, PVF, {"skiplock": "Only root may use this option."}, RootOnly),
    (400, PVF, {"hookscript": "script 'local:snippets/h.sh' does not exist\n"}, InvalidParameter),
    (400, PVF, {"delete": "you can't use '-cores' and -delete cores' at the same time"}, InvalidParameter),
    (400, PVF, {"filename": "invalid filename or wrong extension"}, InvalidParameter),
    (400, "invalid privilege 'VM.Monitor'", None, InvalidParameter),
    (401, "Authentication failed!", {"errors": b""}, Unauthorized),
    (401, "No ticket", {"errors": b""}, Unauthorized),
    (403, "Permission check failed (/vms/101, VM.Audit)", None, PermissionDenied),
    (403, "Permission check failed (/vms/101, VM.Monitor)", None, PermissionDenied),
    (403, "Permission check failed", None, PermissionDenied),
    (403, "Permission check failed (/mapping/pci, Mapping.Modify)", None, PermissionDenied),
    (403, "Permission check failed (/nodes/pve, Sys.Audit)", None, PermissionDenied),
    (403, "Permission check failed (/nodes/pve, Sys.PowerMgmt)", None, PermissionDenied),
    (403, f"Permission check failed (/vms/101, {ONE_OF})", None, PermissionDenied),
    (500, "can't remove VM 101 - protection mode enabled", None, ApiError),
    (500, "VM 101 is not running", None, ApiError),
    (500, "VM 101 is running - destroy failed", None, ApiError),
    (500, "QEMU guest agent is not running", None, ApiError),
    (500, "PCI device '0000:01:00.0' already in use by VMID '101'", None, ApiError),
    (501, "Method 'GET /nodes/pve/nosuch' not implemented", None, ApiError),
]


@pytest.mark.parametrize(("status", "message", "found", "expected"), WORDS, ids=[f"{w[0]} {w[1][:40]}" for w in WORDS])
def test_each_wording_has_its_class(
    status: int, message: str, found: dict[str, Any] | None, expected: type[ApiError]
) -> None:
    error = errors.classify(Request("pve1", "PUT", "/nodes/pve/qemu/101/config"), status, message, found)

    assert type(error) is expected
    assert (error.status, error.message, error.method, error.path) == (
        status,
        message,
        "PUT",
        "/nodes/pve/qemu/101/config",
    )


def test_every_refusal_of_the_transcripts_is_among_them() -> None:
    file = Path(__file__).resolve().parents[3] / "shared" / "data" / "pve-transcripts.txt"
    if not file.is_file():
        pytest.skip("not run (no ../shared/data/pve-transcripts.txt)")
    lines = re.findall(r"ERROR (\d+) [^|]*\| content: (.*?) \| errors: (.*)", file.read_text())
    known = [(status, message, found) for status, message, found, _ in WORDS]

    assert len(lines) > 20
    assert [line for line in lines if (int(line[0]), line[1], literal_eval(line[2])) not in known] == []


TASK_WORDS = [
    ("shrinking disks is not supported", ApiError),
    ("snapshot feature is not available", ApiError),
    ("snapshot 's1' does not exist", NotFound),
    ("PCI device mapping not found for 'nope'", NotFound),
    ("VM is locked (backup)", Locked),
    ("MAX 2 vcpus allowed per VM on this node", ApiError),
    ("unable to create VM 101 - Permission check failed (/storage/nfs, Datastore.AllocateSpace)", PermissionDenied),
    ("download failed: Connecting to 127.0.0.1:1... failed: Connection refused.", ApiError),
]


@pytest.mark.parametrize(("status", "expected"), TASK_WORDS)
def test_task_that_failed_says_why_in_the_same_classes(status: str, expected: type[ApiError]) -> None:
    assert TaskFailed("UPID:pve:1:2:3:qmstart:101:a@pve!t:", status).reason is expected


@pytest.mark.parametrize(
    ("status", "before"),
    [
        ("VM is locked (backup)", True),
        (NODE_LOCK, True),
        (STORAGE_LOCK, False),
        (f"unable to create VM 101 - {STORAGE_LOCK}", False),
    ],
)
def test_only_a_task_that_stopped_at_the_vms_lock_has_done_nothing(status: str, before: bool) -> None:
    assert TaskFailed("UPID:pve:1:2:3:qmstart:101:a@pve!t:", status).before_work is before


def test_message_has_no_secret_and_no_long_value() -> None:
    request = Request(
        "pve1",
        "POST",
        "/nodes/pve1/qemu",
        {
            "cipassword": "hunter 2",
            "sshkeys": "ssh-ed25519%20" + 80 * "A",
            "url": "https://me:pass@mirror.example/a.qcow2",
            "delete": None,
            "cores": 4,
        },
    )
    error = errors.classify(
        request, 400, PVF, {"cipassword": "got 'hunter 2' and hunter%202", "cores": "too many\nby 2\n", "url": "bad"}
    )

    assert str(error) == (
        "pve1: POST /nodes/pve1/qemu: 400 Parameter verification failed.\n"
        "  cipassword: got '***' and ***\n"
        "    sent: ***\n"
        "  cores: too many\n"
        "    by 2\n"
        "    sent: 4\n"
        "  url: bad\n"
        "    sent: https://***@mirror.example/a.qcow2"
    )
    assert error.parameters["sshkeys"] == "ssh-ed25519%20AAAAAAAAAA…"
    assert isinstance(error, InvalidParameter) and set(error.errors) == {"cipassword", "cores", "url"}
    assert "hunter" not in repr(vars(error)) and "hunter" not in repr(request)


def test_missing_privilege_is_named_with_its_alternatives() -> None:
    error = errors.classify(
        Request("pve1", "GET", "/nodes/pve1/qemu/101/agent/ping"),
        403,
        "Permission check failed (/vms/101, VM.GuestAgent.Audit|VM.GuestAgent.Unrestricted)",
        role="Ours",
    )

    assert isinstance(error, PermissionDenied)
    assert (error.privilege, error.acl_path) == ("VM.GuestAgent.Audit|VM.GuestAgent.Unrestricted", "/vms/101")
    assert str(error) == (
        "pve1: the API token lacks VM.GuestAgent.Audit or VM.GuestAgent.Unrestricted on /vms/101\n"
        "GET /nodes/pve1/qemu/101/agent/ping: Permission check failed "
        "(/vms/101, VM.GuestAgent.Audit|VM.GuestAgent.Unrestricted)\n"
        "hint: make bootstrap LAB=… gives the role Ours what this version of gpulab needs"
    )


# Against the double.


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "PAUSE_S", 0.01)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", 0.02)
    monkeypatch.setattr(client_module, "POLL_S", (0.01, 0.01))


@pytest.fixture
def node(bench: Bench) -> Node:
    return inventory.of_run(bench.state).nodes["pve1"]


@pytest.fixture
def client(api: Any, node: Node) -> Client:
    """Patient, with a VM 101 on its node."""
    api.add_vm(101, name="gpu01", tags="gpulab", cores=1, scsi0="local-lvm:vm-101-disk-0,size=32G")
    return Client(node, retry_s=20)


@pytest.fixture
def hasty(client: Client, node: Node) -> Client:
    """Gives up after the first pause."""
    return Client(node, retry_s=0.001)


@pytest.fixture
def sent(api: Any) -> Callable[[str, str], int]:
    """How many such requests of ours the node has looked at since the test began."""
    before = len(api.calls)

    def count(method: str, path: str) -> int:
        ours = [call for call in api.calls[before:] if call.agent == "gpulab"]
        return sum(call.method == method and re.search(path, call.path) is not None for call in ours)

    return count


def config(api: Any, vmid: int = 101) -> dict[str, Any]:
    keys: dict[str, Any] = api.api().nodes("pve1").qemu(vmid).config.get()
    return keys


def with_timeout(node: Node, seconds: float) -> Node:
    return node.model_copy(update={"api": node.api.model_copy(update={"timeout_s": seconds})})


# Reads.


@pytest.mark.parametrize("status", [502, 503, 504, 595, 596, 597, 598, 599])
def test_read_is_sent_again_until_it_is_answered(api: Any, client: Client, status: int) -> None:
    api.answer(status, times=3, path="/version")

    assert client.get("version")["release"] == "9.1"


def test_read_gives_up_at_its_deadline_with_the_last_answer(api: Any, hasty: Client) -> None:
    api.answer(599, times=99, path="/version")

    with pytest.raises(ApiUnreachable) as caught:
        hasty.get("version")
    assert str(caught.value) == "pve1: GET /version: 599 Too many redirections"


def test_read_outlives_a_dropped_connection_and_a_late_answer(api: Any, client: Client, node: Node) -> None:
    client = Client(with_timeout(node, 0.3), retry_s=20)
    api.drop_reply("GET", "/version")
    api.hang_up("GET", "/version")
    api.slow_reply("GET", "/version", 1.0)

    assert client.get("version")["release"] == "9.1"


def test_refusal_is_not_tried_again(client: Client, sent: Callable[[str, str], int]) -> None:
    with pytest.raises(NotFound) as caught:
        client.get("nodes", "pve1", "qemu", 999, "config")

    assert caught.value.brief == (
        "pve1: GET /nodes/pve1/qemu/999/config: 500 Configuration file 'nodes/pve1/qemu-server/999.conf' does not exist"
    )
    assert sent("GET", "/999/config$") == 1


def test_node_without_api_is_named(client: Client, node: Node) -> None:
    closed = node.model_copy(update={"api": node.api.model_copy(update={"port": 1})})

    with pytest.raises(ApiUnreachable, match=r"pve1: the API at https://127\.0\.0\.1:1 does not answer") as caught:
        Client(closed, retry_s=0.001).get("version")
    assert "Connection refused" in str(caught.value)
    assert not caught.value.lost


# Changes whose answer is lost.


@pytest.mark.parametrize("fault", ["drop", "slow"])
def test_change_with_a_task_is_found_in_the_task_list(
    api: Any, client: Client, node: Node, sent: Callable[[str, str], int], fault: str
) -> None:
    client = Client(with_timeout(node, 0.3), retry_s=20)
    if fault == "drop":
        api.drop_reply("PUT", "/resize$")
    else:
        api.slow_reply("PUT", "/resize$", 1.0)

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert "size=64G" in config(api)["scsi0"]
    assert sent("PUT", "/resize$") == 1


@pytest.mark.parametrize("fault", [595, 596, 599, "hang up"])
def test_change_that_was_not_carried_out_is_sent_again(
    api: Any, client: Client, sent: Callable[[str, str], int], fault: int | str
) -> None:
    if isinstance(fault, int):
        api.answer(fault, method="PUT", path="/resize$")
    else:
        client.get("version")
        api.hang_up("PUT", "/resize$")

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert "size=64G" in config(api)["scsi0"]
    assert sent("PUT", "/resize$") == 1


def test_earlier_task_of_the_same_kind_is_not_taken_for_the_lost_one(api: Any, client: Client) -> None:
    for size in ("40G", "48G"):
        client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size=size)
    api.hang_up("PUT", "/resize$")

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert "size=64G" in config(api)["scsi0"]


@pytest.mark.parametrize("who", ["root@pam", "gpulab@pve", "gpulab@pve!other"])
def test_task_of_somebody_else_is_not_taken_for_ours(api: Any, client: Client, who: str) -> None:
    api.emulator.tasks.start("resize", 101, who, lambda log: None)
    api.hang_up("PUT", "/resize$")

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert "size=64G" in config(api)["scsi0"]


def test_refused_second_sending_is_looked_up_once_more(
    api: Any, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A creation that the node began late makes the second request fail: it is the first one's work."""
    looked = []
    begun = Client._begun

    def late(self: Client, *arguments: Any) -> str | None:
        looked.append(arguments)
        return begun(self, *arguments) if len(looked) > client_module.LOOKS else None

    monkeypatch.setattr(Client, "_begun", late)
    api.drop_reply("POST", "/qemu$")

    client.run_task("POST", "nodes", "pve1", "qemu", task="qmcreate", deadline_s=20, vmid=102, memory=512)

    assert config(api, 102)["memory"] == "512"
    assert len(looked) == client_module.LOOKS + 1


def test_change_without_a_task_is_asked_after(api: Any, client: Client, sent: Callable[[str, str], int]) -> None:
    api.drop_reply("PUT", "/config$")
    digest = config(api)["digest"]

    client.change("PUT", *CONFIG, applied=lambda: client.get(*CONFIG)["cores"] == 2, cores=2, digest=digest)

    assert config(api)["cores"] == 2
    assert sent("PUT", "/config$") == 1


def test_lost_change_that_is_not_in_force_is_sent_again(api: Any, client: Client) -> None:
    api.hang_up("PUT", "/config$")
    digest = config(api)["digest"]

    client.change("PUT", *CONFIG, applied=lambda: client.get(*CONFIG)["cores"] == 2, cores=2, digest=digest)

    assert config(api)["cores"] == 2


def test_digest_mismatch_after_a_lost_answer_is_the_first_sending(
    api: Any, client: Client, sent: Callable[[str, str], int]
) -> None:
    answers = iter([False] * client_module.LOOKS + [True])
    api.drop_reply("PUT", "/config$")

    client.change("PUT", *CONFIG, applied=lambda: next(answers), cores=2, digest=config(api)["digest"])

    assert sent("PUT", "/config$") == 2
    assert config(api)["cores"] == 2


def test_change_whose_answers_are_all_lost_says_that_it_may_have_been_made(api: Any, hasty: Client) -> None:
    api.answer(596, times=99, method="PUT", path="/config$")

    with pytest.raises(ApiUnreachable) as caught:
        hasty.change("PUT", *CONFIG, cores=2)
    assert str(caught.value) == (
        "pve1: PUT /nodes/pve1/qemu/101/config: 596 Broken pipe\n"
        "The answer to a change was lost: it may have been made.\n"
        "hint: deploy again: it reads first what is there"
    )


def test_clock_of_the_node_counts_not_ours(api: Any, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.get("version")
    now = client_module.time.time
    monkeypatch.setattr(client_module, "time", _Clock(now() + 7200))
    client.get("version")
    api.drop_reply("PUT", "/resize$")

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert -7210 < client._clock_ahead < -7190
    assert "size=64G" in config(api)["scsi0"]


class _Clock:
    """`time` whose wall clock stands elsewhere."""

    def __init__(self, now: float) -> None:
        import time

        self._now = now
        self.monotonic, self.sleep = time.monotonic, time.sleep

    def time(self) -> float:
        return self._now


# Locks and digests.


def test_lock_that_is_released_is_waited_for(api: Any, client: Client, sent: Callable[[str, str], int]) -> None:
    api.lock_vm(101)
    threading.Timer(0.2, api.lock_vm, (101, "")).start()

    client.change("PUT", *CONFIG, cores=2)

    assert config(api)["cores"] == 2
    assert sent("PUT", "/config$") > 1


def test_task_that_finds_the_lock_is_started_again(api: Any, client: Client) -> None:
    api.fail_task("resize", "VM is locked (backup)", times=2)

    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")

    assert "size=64G" in config(api)["scsi0"]


def test_lock_that_stays_is_named_with_who_is_at_work(api: Any, hasty: Client) -> None:
    release = api.hold_task("qmconfig")
    api.lock_vm(101)
    api.emulator.tasks.start("qmconfig", 101, "root@pam", lambda log: None)

    with pytest.raises(Locked) as caught:
        hasty.change("PUT", *CONFIG, cores=2)
    release()
    assert caught.value.lock == "backup"
    assert str(caught.value) == (
        "pve1: PUT /nodes/pve1/qemu/101/config: 500 VM is locked (backup)\n"
        "Still so after 0 s. At work on the node now:\n"
        "  qmconfig of 101 by root@pam\n"
        "hint: deploy again when that has ended"
    )


def test_lock_that_nobody_holds_says_how_to_clear_it(api: Any, hasty: Client) -> None:
    api.lock_vm(101, "snapshot")

    with pytest.raises(Locked) as caught:
        hasty.change("PUT", *CONFIG, cores=2)
    assert str(caught.value).splitlines()[1:] == [
        "Still so after 0 s. No task is at work on the node.",
        "hint: when nothing holds it any more: qm unlock 101 on pve1, then deploy again",
    ]


def test_lock_that_the_task_finds_and_that_stays_is_a_lock_too(api: Any, hasty: Client) -> None:
    api.fail_task("resize", "VM is locked (backup)", times=99)

    with pytest.raises(Locked, match=r"PUT /nodes/pve1/qemu/101/resize: 500 VM is locked \(backup\)"):
        hasty.run_task("PUT", *VM, "resize", task="resize", deadline_s=20, disk="scsi0", size="64G")


def test_change_with_an_old_digest_is_refused(api: Any, client: Client, sent: Callable[[str, str], int]) -> None:
    digest = config(api)["digest"]
    api.api().nodes("pve1").qemu(101).config.put(description="mine")

    with pytest.raises(DigestMismatch) as caught:
        client.change("PUT", *CONFIG, cores=2, digest=digest)
    assert str(caught.value) == (
        "pve1: PUT /nodes/pve1/qemu/101/config: 500 checksum mismatch (file change by other user?)\n"
        "Somebody else changed it between our read and our change; nothing of ours was applied.\n"
        "hint: deploy again: it reads the present state first"
    )
    assert sent("PUT", "/config$") == 1


def test_change_with_digest_is_made_anew_on_what_it_finds(api: Any, client: Client) -> None:
    def somebody() -> None:
        api.state.vms[101].config["description"] = "somebody was here"

    api.meanwhile("PUT", "/config$", somebody)

    with_digest(
        lambda: client.get(*CONFIG), lambda found: client.change("PUT", *CONFIG, cores=2, digest=found["digest"])
    )

    assert (config(api)["cores"], config(api)["description"]) == (2, "somebody was here")


def test_digest_that_changes_each_time_ends_as_an_error(api: Any, client: Client) -> None:
    reads = []

    def change(found: dict[str, Any]) -> None:
        reads.append(found)
        client.change("PUT", *CONFIG, cores=2, digest=40 * "0")

    with pytest.raises(DigestMismatch):
        with_digest(lambda: client.get(*CONFIG), change)
    assert len(reads) == client_module.DIGEST_TRIES


# Tasks.


def resize(client: Client, deadline_s: float = 20) -> None:
    client.run_task("PUT", *VM, "resize", task="resize", deadline_s=deadline_s, disk="scsi0", size="64G")


def test_failed_task_shows_its_last_lines_however_long_its_log(
    api: Any, client: Client, sent: Callable[[str, str], int]
) -> None:
    api.fail_task("resize", "no space left on device", log=[f"line {number}" for number in range(1200)])

    with pytest.raises(TaskFailed) as caught:
        resize(client)
    assert str(caught.value) == (
        "pve1: task resize failed: no space left on device\n"
        "  line 1195\n  line 1196\n  line 1197\n  line 1198\n  line 1199"
    )
    assert len(caught.value.log) == 1201
    assert sent("PUT", "/resize$") == 1


def test_warnings_of_a_task_are_shown(api: Any, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    api.warn_task("resize", "WARN: the thin pool is over-provisioned", "WARN: and nearly full")

    with caplog.at_level(logging.INFO):
        resize(client)

    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "[pve1] task resize ended with warnings",
        "[pve1]   WARN: the thin pool is over-provisioned",
        "[pve1]   WARN: and nearly full",
    ]
    assert "size=64G" in config(api)["scsi0"]


def test_task_that_never_ends_is_given_up_with_its_last_line(api: Any, client: Client) -> None:
    release = api.hold_task("resize", log=["transferred 1.0 GiB of 3.0 GiB (33.33%)"])

    with pytest.raises(TaskUnfinished) as caught:
        resize(client, deadline_s=0.1)
    release()
    lines = str(caught.value).splitlines()
    assert lines[0] == "pve1: task resize has not ended after 0 s"
    assert lines[1].startswith("Task: UPID:pve1:")
    assert lines[2:] == [
        "Last: transferred 1.0 GiB of 3.0 GiB (33.33%)",
        "hint: it may still end; look at it in the node's task list, then deploy again",
    ]


def test_long_task_shows_how_far_it_is(
    api: Any, client: Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "PROGRESS_S", 0.0)
    release = api.hold_task("resize", log=["begin", " 51200K .......... .......... .......... 40% 10.1M 30s"])
    threading.Timer(0.5, release).start()

    with caplog.at_level(logging.INFO):
        resize(client)

    lines = [record.getMessage() for record in caplog.records if record.name == "pyinfra"]
    assert lines.count("[pve1] resize: 51200K 40% 10.1M 30s") == 1


def test_polling_tolerates_a_busy_node_until_the_deadline(api: Any, hasty: Client) -> None:
    for status in (595, 596, 599):
        api.answer(status, times=3, method="GET", path="/tasks/")
    api.drop_reply("GET", "/tasks/")

    resize(hasty)

    assert "size=64G" in config(api)["scsi0"]


def test_node_that_never_tells_how_the_task_ended(api: Any, client: Client) -> None:
    api.answer(599, times=9999, method="GET", path="/tasks/")

    with pytest.raises(TaskUnfinished, match=r"Last: pve1: GET /nodes/pve1/tasks/UPID.*/status: 599"):
        resize(client, deadline_s=0.2)


def test_log_that_cannot_be_read_does_not_hide_why_a_task_failed(api: Any, hasty: Client) -> None:
    api.fail_task("resize", "no space left on device")
    api.answer(599, times=99, method="GET", path="/log$")

    with pytest.raises(TaskFailed) as caught:
        resize(hasty)
    assert str(caught.value) == "pve1: task resize failed: no space left on device"


def test_task_without_the_privilege_says_which_and_what_to_do(api: Any, client: Client) -> None:
    api.take_away("Datastore.AllocateSpace")

    with pytest.raises(TaskFailed) as caught:
        resize(client)
    assert caught.value.reason is PermissionDenied
    assert str(caught.value) == (
        "pve1: task resize failed: Permission check failed (/storage/local-lvm, Datastore.AllocateSpace)\n"
        "hint: make bootstrap LAB=… gives the token's role what this version of gpulab needs"
    )


def test_log_of_a_task_is_read_to_its_end(api: Any, client: Client) -> None:
    upid = api.emulator.tasks.start("vzdump", 101, "gpulab@pve!deploy", lambda log: [log(str(n)) for n in range(1001)])
    api.wait(upid)
    api.answer(599, times=1, method="GET", path="/log$")

    assert client.log(upid) == [*map(str, range(1001)), "TASK OK"]


# Rights, tokens, certificates.


def test_token_without_the_privilege(api: Any, client: Client, sent: Callable[[str, str], int]) -> None:
    api.take_away("VM.Config.CPU")

    with pytest.raises(PermissionDenied, match=r"pve1: the API token lacks VM\.Config\.CPU on /vms/101"):
        client.change("PUT", *CONFIG, cores=2)
    assert sent("PUT", "/config$") == 1


def test_key_that_only_root_may_set(client: Client) -> None:
    with pytest.raises(RootOnly) as caught:
        client.change("PUT", *CONFIG, affinity="0-3")
    assert str(caught.value) == (
        "pve1: PUT /nodes/pve1/qemu/101/config: 500 only root can set 'affinity' config\n"
        "PVE lets only the login root@pam do this, never an API token.\n"
        "hint: gpulab sets over SSH, as root, what no token may; do the same for this on the node"
    )


def test_wrong_parameter_is_shown_with_what_was_sent(client: Client) -> None:
    with pytest.raises(InvalidParameter) as caught:
        client.change("PUT", *CONFIG, cores="many")
    assert str(caught.value) == (
        "pve1: PUT /nodes/pve1/qemu/101/config: 400 Parameter verification failed.\n"
        "  cores: type check ('integer') failed - got 'many'\n"
        "    sent: many"
    )


def test_existing_vm_is_not_made_again(client: Client) -> None:
    with pytest.raises(AlreadyExists, match="VM 101 already exists on node 'pve1'"):
        client.change("POST", "nodes", "pve1", "qemu", task="qmcreate", vmid=101, memory=512)


def test_removed_token(api: Any, client: Client) -> None:
    api.revoke_token()

    with pytest.raises(Unauthorized) as caught:
        client.get("version")
    assert str(caught.value) == (
        "pve1: the API refuses the token (Authentication failed!)\nhint: make bootstrap LAB=… makes a new one"
    )


@pytest.mark.parametrize("pem", ["another CA", "nonsense"])
def test_wrong_ca_is_refused_at_once(
    api: Any, client: Client, node: Node, tmp_path: Path, sent: Callable[[str, str], int], pem: str
) -> None:
    node.ca_file.write_text(ca.authority(tmp_path / "other").certificate.read_text() if pem == "another CA" else pem)

    with pytest.raises(GpulabError) as caught:
        Client(node, retry_s=20).get("version")
    lines = str(caught.value).splitlines()
    assert lines[0] == f"pve1: the API's certificate does not check against {node.ca_file}"
    assert lines[-1] == (
        "hint: if the node has a new certificate on purpose, `make bootstrap LAB=…` fetches the CA over SSH again"
    )
    assert not isinstance(caught.value, ApiUnreachable)
    assert sent("GET", "/version") == 0


def pinned(node: Node, fingerprint: str) -> Node:
    return node.model_copy(update={"api": node.api.model_copy(update={"fingerprint": fingerprint})})


def test_pinned_fingerprint_needs_no_ca(api: Any, client: Client, node: Node) -> None:
    fingerprint = api.root().nodes("pve1").certificates.info.get()[0]["fingerprint"]
    node.ca_file.unlink()

    assert Client(pinned(node, fingerprint), retry_s=0.001).get("version")["release"] == "9.1"


def test_other_fingerprint_is_refused_although_the_ca_fits(
    client: Client, node: Node, sent: Callable[[str, str], int]
) -> None:
    with pytest.raises(GpulabError) as caught:
        Client(pinned(node, ":".join(32 * ["AB"])), retry_s=20).get("version")
    lines = str(caught.value).splitlines()
    assert lines[0] == "pve1: the API's certificate is not the one whose fingerprint is pinned"
    assert "Fingerprints did not match" in lines[1]
    assert lines[2] == (
        "hint: `pvenode cert info` on pve1, over SSH or at its console, shows the right one; "
        "if it was renewed on purpose, write that into the node's `api`"
    )
    assert sent("GET", "/version") == 0


def test_pin_holds_behind_a_proxy_too(client: Client, node: Node) -> None:
    adapter = Client(pinned(node, 32 * "ab")).api._store["session"].get_adapter("https://pve1:8006/")

    assert adapter.proxy_manager_for("http://proxy:3128").connection_pool_kw["assert_fingerprint"] == 32 * "ab"


@pytest.mark.parametrize("right", [True, False])
def test_verify_trusts_the_same_fingerprint_and_no_other(api: Any, client: Client, node: Node, right: bool) -> None:
    """Its own client; the tests of verify have no server."""
    fingerprint = api.root().nodes("pve1").certificates.info.get()[0]["fingerprint"]
    found = verify_api.Api(pinned(node, fingerprint if right else ":".join(32 * ["AB"]))).reach()

    assert bool(found["error"]) is not right
    assert right or "does not check against AB:AB" in found["error"]

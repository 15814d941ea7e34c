# SPDX-License-Identifier: MIT
"""The lab that the faults happen in: jobs that start from the same state each time, and what must hold after each.

A job is a run of deploy.py or rebuild.py, reduced to its steps that talk to the API. A verdict is found out here, from
the state of the lab before and after; no case can state it.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api.exceptions import ConnectError
from pyinfra.context import ctx_host, ctx_state

import inventory
from inventory import GpulabError, Node
from operations import step
from operations.proxmox import access, client, host_keys, mapping, order, rebuild, swap, vm
from operations.proxmox.client import Client
from operations.proxmox.mapping import PciDevices
from operations.proxmox.node_shell import NodeShell
from rehearsal.pve.state import NodeState
from rehearsal.pve.testing import FakeLab
from tests.api import sites
from tests.api.conftest import PASSTHROUGH, make_bench
from tests.api.sites import ADDRESS, DATA_BORN, NEW_KEY, OLD_KEY, PUBLIC_KEY, SYSTEM_BORN, ImageServer, Killed, Site

from .table import Row, Verdict

CARD = {"path": "0000:01:00", "id": "10de:24b0", "subsystem_id": "10de:14ad", "iommu_group": 14}
DEVICES = {"a4000": "0000:01:00"}
#: A node of the same cluster that no run here is about.
ELSEWHERE = "id=10de:24b0,iommugroup=3,node=pve9,path=0000:81:00,subsystem-id=10de:14ad"

Steps = Sequence[tuple[str, Any, dict[str, Any]]]
DEPLOY: Steps = (
    ("gpu01", vm.preflight, {}),
    ("pve1", mapping.mappings, {"devices": DEVICES}),
    ("gpu01", vm.image, {}),
    ("gpu01", vm.create_or_update, {}),
    ("gpu01", vm.started, {}),
)


@dataclass(frozen=True)
class Job:
    """`words`: of `--data`, for rebuild.py; None: it is a deploy. `differs`: what the guest declares."""

    name: str
    steps: Steps
    words: dict[str, Any] | None = None
    differs: dict[str, Any] = field(default_factory=dict)


#: What a deploy finds to do on a VM that exists: keys for a running and a stopped VM, a disk, a key over SSH.
CHANGED: dict[str, Any] = {"cores": 4, "affinity": "0-1", "data_disk": {"size_gib": 300}, "onboot": False}
JOBS = {
    job.name: job
    for job in (
        Job("create", DEPLOY),
        Job("mapping", DEPLOY[1:2]),
        Job("update", DEPLOY, differs=CHANGED),
        Job("rebuild", [("gpu01", each, {}) for each in sites.REBUILD], {}),
        Job("destroy", [("gpu01", each, {}) for each in sites.DESTROY], {"destroy": True}),
        Job("rollback", [("gpu01", each, {}) for each in sites.ROLLBACK], {"rollback": True}),
    )
}


@dataclass(frozen=True)
class Case:
    """One fault. `says`: what the whole message has to match.

    `cleared`: what happens before the next run, beside the end of every fault that was injected. `holds`: what has to
    be so at the end, beside what every case is looked at for.
    """

    job: str
    where: str
    injected: str
    expected: Verdict
    inject: Callable[[World], object]
    says: str = ""
    cleared: Callable[[World], object] = lambda world: None
    holds: Callable[[World], bool] = lambda world: True


@dataclass
class Outcome:
    """What one run came to. `heard`: every line that it showed as an error; `told`: every line at all.

    `did`: the commands that ran.
    """

    ok: bool = False
    killed: bool = False
    #: Did the node no longer answer when the run ended?
    cut_off: bool = False
    heard: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    did: int = 0

    @property
    def text(self) -> str:
        return "\n".join(self.heard)

    @property
    def first(self) -> str:
        return self.heard[0] if self.heard else "(the process was killed)" if self.killed else ""


@dataclass
class Snapshot:
    """The lab at one moment, behind the API and on the control machine."""

    state: NodeState
    started: dict[int, Any]
    known_hosts: str
    smbios: str = ""
    net: str = ""


class World(Site):
    """One node, one guest of ours, VMs of others, and the state that each job begins with."""

    def __init__(self, api: FakeLab, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(api, folder, monkeypatch)
        self.job = JOBS["create"]
        self._undo: list[Callable[[], object]] = []
        self.too_early = self.had_system = False
        self.server = ImageServer()
        self.patch()
        self.snapshots: dict[str, Snapshot] = {}
        self.fresh_node()
        self._prepare()

    # How the machine around the code is stood in for.

    def patch(self) -> None:
        sites.stand_in(self.monkeypatch)
        self.monkeypatch.chdir(self.folder)
        self.monkeypatch.setattr(client, "LONGEST_PAUSE_S", 0.05)
        self.monkeypatch.setattr(step, "read", self._read)
        self.monkeypatch.setattr(client, "Patience", self._patience(client.Patience))
        sites.root_on_the_node(self.api, self.monkeypatch)
        self.monkeypatch.setattr(Client, "_send", self._counted(Client._send))
        self.monkeypatch.setattr(NodeShell, "_run", self._counted(NodeShell._run))

    @staticmethod
    def _read(fact: Any, **_: Any) -> Any:
        return {"0000:01:00": dict(CARD)} if fact is PciDevices else {"finished": True}

    def _patience(self, real: Any) -> Any:
        """Waiting, of which nobody waits for more than `patience_s`."""
        world = self

        class Short(real):  # type: ignore[misc]
            def __init__(self, seconds: float) -> None:
                super().__init__(min(seconds, world.patience_s))

        return Short

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Every request and every command over SSH: a process may be killed before and after each."""

        def send(this: Any, *arguments: Any) -> Any:
            if self.dead:
                raise Killed
            if self.steady:
                # So that requests have the same number in each run.
                self.api.emulator.tasks.join(60)
            self.sent += 1
            self.look()
            if self.sent == self.kill_before:
                self.dead = True
                raise Killed
            try:
                return real(this, *arguments)
            finally:
                if self.sent == self.kill_after or self.kill_when(arguments):
                    self.dead = True
                    raise Killed

        return send

    # The states that the jobs begin with.

    def fresh_node(self) -> None:
        self.calm()
        self.api.reset()
        self.rights()
        self.api.power.snippets["snippets/gpulab-vendor.yaml"] = "#cloud-config\n"
        self.api.power.answers[PUBLIC_KEY] = (0, NEW_KEY.encode() + b" root@gpu01\n")
        sites.next_door(self.api)
        host_keys.pin(self.folder / "state", *ADDRESS, [])
        host_keys.pin(self.folder / "state", "192.0.2.11", 22, ["ssh-ed25519 AAAAnode"])

    def rights(self, major: int = 9) -> None:
        """What `make bootstrap` gives the token, on the version that the node then has."""
        with self.api.lock:
            self.api.state.release = {8: "8.4.1", 9: "9.1.1"}[major]
            self.api.state.acl[:] = [entry for entry in self.api.state.acl if entry.who != self.api.user]
        node = Node(name="pve1", ssh_hostname="192.0.2.11", passthrough=PASSTHROUGH)
        for path in access.paths(node):
            self.api.grant(self.api.user, path, " ".join(access.privileges(major)))

    def calm(self) -> None:
        """No fault waits any more."""
        self.api.emulator.faults.clear()
        self.api.power.start_gate.set()
        self.api.power.mute.clear()
        self.api.power.stubborn.clear()
        self.api.power.fail_start = ""
        self.server.content = self.server.CONTENT
        self.patience_s, self.timeout_s, self.boot_s = 20.0, 0.0, 0.0
        self.kill_before = self.kill_after = self.sent = 0
        self.kill_when: Callable[[tuple[Any, ...]], bool] = lambda arguments: False
        self.dead, self.steady = False, True
        self.look: Callable[[], object] = lambda: None
        for undo in self._undo:
            undo()
        self._undo.clear()

    def set(self, where: Any, name: str, value: Any) -> None:
        """Another value for a constant, until the fault has ended."""
        before = getattr(where, name)
        setattr(where, name, value)
        self._undo.append(lambda: setattr(where, name, before))

    def _prepare(self) -> None:
        entry = mapping.Device(**CARD).entry("pve1")
        self.verify(0)
        self.snapshots["create"] = self._snapshot()
        assert self.run("create").ok
        # What is compared is the identity of volumes, which survives any change of their names.
        with self.api.lock:
            for volume in self.api.state.volumes:
                born = {sites.OLD: SYSTEM_BORN, sites.DATA: DATA_BORN}.get(volume.volid)
                volume.ctime = volume.ctime if born is None else born
            self.api.state.mappings["a4000"].map = [ELSEWHERE, entry]
        self.put(description="ours: hands off")
        host_keys.pin(self.folder / "state", *ADDRESS, [OLD_KEY])
        self.snapshots["rebuild"] = self.snapshots["destroy"] = self._snapshot()
        with self.api.lock:
            self.api.state.vms[101].config["hostpci1"] = "mapping=a4000"
        self.snapshots["update"] = self._snapshot()
        self.restore("rebuild")
        with self.api.lock:
            self.api.state.mappings["a4000"].map = [ELSEWHERE, entry.replace("iommugroup=14", "iommugroup=9")]
        self.snapshots["mapping"] = self._snapshot()
        self.restore("rebuild")
        self.verify(1)
        assert not self.run("rebuild").ok
        self.verify(0)
        self.snapshots["rollback"] = self._snapshot()

    def _snapshot(self) -> Snapshot:
        self.api.emulator.tasks.join(60)
        with self.api.lock:
            state = self.api.state.model_copy(deep=True)
        found = state.vms.get(101)
        known_hosts = (self.folder / "state" / "known_hosts").read_text()
        snapshot = Snapshot(state, dict(self.api.power.started), known_hosts)
        if found is not None:
            snapshot.smbios, snapshot.net = str(found.config["smbios1"]), str(found.config["net0"])
        return snapshot

    def verify(self, status: int, words: str = "") -> None:
        """What verify will say; whether the old system disk is still there is looked at while it runs."""
        super().verify(status, words)
        real: Callable[..., list[str]] = rebuild.verify_command

        def command(*arguments: Any) -> list[str]:
            born = self.volumes().values()
            expected = self.job.name == "rebuild" and self.had_system
            self.too_early = self.too_early or (expected and SYSTEM_BORN not in born)
            return real(*arguments)

        self.monkeypatch.setattr(rebuild, "verify_command", command)

    def restore(self, job: str) -> None:  # type: ignore[override]
        """The lab as the job finds it."""
        self.calm()
        self.end()
        self.job = JOBS[job]
        snapshot = self.snapshots[job]
        self.api.emulator.tasks.join(60)
        self.verified = self.too_early = False
        self.verify(0)
        self.besides: set[str] = set()
        self.attached = False
        with self.api.lock:
            pid = self.api.state.next_pid
            self.api.emulator.store.state = snapshot.state.model_copy(deep=True, update={"next_pid": pid})
            self.foreign = {vmid: dict(vm.config) for vmid, vm in snapshot.state.vms.items() if vmid != 101}
        self.api.power.started = dict(snapshot.started)
        self.api.power.agents = set(snapshot.started)
        self.api.emulator.running._held.clear()
        self.api.emulator.running.hold_again()
        self.smbios, self.net = snapshot.smbios, snapshot.net
        (self.folder / "state" / "known_hosts").write_text(snapshot.known_hosts)
        self._image_file().unlink(missing_ok=True)
        if any(volume.content == "import" for volume in snapshot.state.volumes):
            self._image_file().parent.mkdir(parents=True, exist_ok=True)
            self._image_file().write_bytes(self.server.CONTENT)
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        self.api.requests.clear()

    def _image_file(self) -> Path:
        return self.api.folder / "storage" / "local" / "import" / "debian-13.qcow2"

    # A run, as a process of its own.

    def run(self, name: str = "") -> Outcome:
        """The job from its first to its last step; another job on the same declaration, if one is named."""
        job = JOBS[name] if name else self.job
        outcome = Outcome()
        with _listening(outcome):
            try:
                self._run(job, outcome)
            except Killed:
                outcome.killed = True
            except ConnectError as error:
                outcome.heard += str(error).splitlines()
        outcome.cut_off = not self._answers()
        self.end()
        self.bench = None
        return outcome

    def _answers(self) -> bool:
        try:
            self.api.root()
        except Exception:
            return False
        return True

    def _run(self, job: Job, outcome: Outcome) -> None:
        self.end()
        self.runs += 1
        self.had_system = SYSTEM_BORN in self.volumes().values()
        self.bench = make_bench(self.api, self.folder, self.monkeypatch, image=self.server.image, **self.job.differs)
        state, guest = self.bench.state, self.bench.host
        self._hurry(inventory.of_run(state))
        if job.words is not None:
            run = f"me@{sites.socket.gethostname()}:{self.runs}:1"
            order._orders[state] = order.Order("lab.py", run, **job.words)
            guest.connector.closed = True
        with ctx_state.use(state):
            with ctx_host.use(guest):
                guest.connector.connect()
            for name, operation, arguments in job.steps:
                host = state.inventory.get_host(name)
                with ctx_host.use(host):
                    if not self._step(state, host, operation, arguments, outcome):
                        return
        outcome.ok = True

    @staticmethod
    def _step(state: Any, host: Any, operation: Any, arguments: dict[str, Any], outcome: Outcome) -> bool:
        try:
            for command in operation._inner(**arguments):
                outcome.did += 1
                if command.execute(state, host, {}) is False:
                    return False
        except GpulabError as error:
            return step.refuse(state, host, error)
        return True

    def _hurry(self, lab: Any) -> None:
        if self.timeout_s:
            node = lab.nodes["pve1"]
            lab.nodes["pve1"] = node.model_copy(
                update={"api": node.api.model_copy(update={"timeout_s": self.timeout_s})}
            )
        if self.boot_s:
            lab.guests["gpu01"] = lab.guests["gpu01"].model_copy(update={"boot_timeout_s": self.boot_s})

    # What must hold.

    def picture(self) -> object:
        """All that a run can change, for comparison."""
        with self.api.lock:
            state = self.api.state
            vms = {vmid: (dict(each.config), dict(each.pending)) for vmid, each in state.vms.items()}
            for config, _ in vms.values():
                # What somebody else changes in these tests; nothing of ours ever does.
                config.pop("cpulimit", None)
                if config.get("lock") == "backup":
                    del config["lock"]
            volumes = sorted((volume.volid, volume.ctime, volume.size) for volume in state.volumes)
            mappings = {name: sorted(found.map) for name, found in state.mappings.items()}
        known_hosts = (self.folder / "state" / "known_hosts").read_text()
        return vms, volumes, mappings, sorted(self.api.power.started), known_hosts

    def harm(self, outcome: Outcome, before: NodeState) -> list[str]:
        """What is broken that must hold after every run, whatever happened in it."""
        if self.steady:
            self.api.emulator.tasks.join(60)
        with self.api.lock:
            state = self.api.state.model_copy(deep=True)
        found = []
        for vmid, config in self.foreign.items():
            now = state.vms.get(vmid)
            if now is None or dict(now.config) != config or now.pending:
                found.append(f"VM {vmid} of somebody else was changed")
            if (vmid in self.snapshots[self.job.name].started) != self.api.power.running(vmid):
                found.append(f"VM {vmid} of somebody else was started or stopped")
        there = {volume.volid for volume in state.volumes}
        found += [
            f"volume {volume.volid} of somebody else is gone"
            for volume in before.volumes
            if volume.vmid in self.foreign and volume.volid not in there
        ]
        for name, each in before.mappings.items():
            if _of_others(state.mappings[name].map) != _of_others(each.map):
                found.append(f"mapping {name}: an entry of another node was changed")
        if sorted(state.mappings["theirs"].map) != sorted(before.mappings["theirs"].map):
            found.append("mapping theirs was changed")
        found += self._harm_of_ours(state, outcome)
        found += self._leaks(outcome)
        return found

    def _harm_of_ours(self, state: NodeState, outcome: Outcome) -> list[str]:
        if self.job.name == "create":
            return []
        found = []
        born = {volume.volid: volume.ctime for volume in state.volumes}
        ours = state.vms.get(101)
        destroying = self.job.name == "destroy"
        attached = born.get(swap.volume(ours.future().get("scsi1", ""))) if ours is not None else None
        if DATA_BORN not in born.values():
            found.append("the data disk is gone")
        elif self.attached and not destroying and attached != DATA_BORN:
            # On its way to a keeper and back it is looked for at the end.
            found.append("the data disk is not attached")
        if ours is None or (destroying and ours.lock):
            return found if destroying else [*found, "our VM is gone"]
        config = ours.future()
        if (config.get("smbios1"), config.get("net0")) != (self.smbios, self.net):
            found.append("our VM has another identity")
        if self.too_early or (not self.verified and not destroying and SYSTEM_BORN not in born.values()):
            found.append("the old system disk is gone before verify has passed")
        # A process that is dead, or whom nobody answers, cannot put it back: the next one does.
        if not (outcome.killed or outcome.cut_off) and str(config.get("protection")) != "1":
            found.append("protection is lifted")
        return found

    def _leaks(self, outcome: Outcome) -> list[str]:
        told = [*outcome.heard, *outcome.told, *(path.read_text() for path in (self.folder / "runs").glob("*.jsonl"))]
        return ["a message or the run's record holds the token"] if any(self.api.token in text for text in told) else []

    def unfinished(self) -> list[str]:
        """What the job has not reached, though its last run ended well."""
        with self.api.lock:
            if 101 not in self.api.state.vms:
                return ["our VM is not there"]
        config, found = self.config(), []
        if str(config.get("protection")) != "1":
            found.append("protection is lifted")
        if not self.api.power.running(101):
            found.append("our VM does not run")
        if self.job.name in ("rebuild", "destroy"):
            born = self.volumes()
            unused = set(swap.unused(config).values()) - self.besides
            if SYSTEM_BORN in born.values() or unused or swap.marker(config) or "scsi30" in config:
                found.append(f"the rebuild has not ended: {config}")
            if self.keys() != [NEW_KEY]:
                found.append(f"the host key is {self.keys()}")
            named = {swap.volume(value) for value in config.values()}
            if orphans := sorted(set(born) - named - self.besides):
                found.append(f"volumes that nobody names: {orphans}")
            with self.api.lock:
                others = set(self.api.state.vms) - {101, *self.foreign}
            if others:
                found.append(f"VMs that were not there: {others}")
            if born.get(swap.volume(config.get("scsi1", ""))) != DATA_BORN:
                found.append("the data disk is not on scsi1")
        if self.job.name == "rollback" and self.volumes().get(swap.volume(config["scsi0"])) != SYSTEM_BORN:
            found.append("the old system is not back")
        return found

    # One fault, from the first run to the verdict.

    def suffer(self, case: Case) -> tuple[Row, list[str]]:
        """Let the fault happen; its line of the table, and all that was not as it should be."""
        self.restore(case.job)
        case.inject(self)
        with self.api.lock:
            before = self.api.state.model_copy(deep=True)
        data = swap.volume(before.vms[101].config.get("scsi1", "")) if 101 in before.vms else ""
        self.attached = (data, DATA_BORN) in [(volume.volid, volume.ctime) for volume in before.volumes]
        start = self.picture()
        self.sent = 0
        first = self.run()
        wrong = self.harm(first, before)
        changed = self.picture() != start
        wrong += [f"this never happened: {fault}" for fault in self.api.emulator.faults.never_happened]
        self.calm()
        self.api.emulator.tasks.join(60)
        self.verify(0)
        verdict = Verdict.SURVIVED
        if not first.ok:
            verdict = Verdict.HEALED if changed or first.killed else Verdict.REFUSED
            wrong += [] if first.killed else _unclear(first)
            case.cleared(self)
            wrong += self._again(before)
        wrong += self._settled(before)
        if not case.holds(self):
            wrong.append("what this fault must leave alone is not as it was")
        row = Row(f"{case.job}: {case.where}", case.injected, Verdict.LOST if wrong else verdict, first.first)
        if row.verdict is not case.expected:
            wrong.append(f"expected: {case.expected.value}, found: {verdict.value}")
        if not re.search(case.says, first.text):
            wrong.append(f"expected a message like {case.says!r}")
        return row, [*wrong, *(["the user saw:", first.text] if wrong else [])]

    def _again(self, before: NodeState) -> list[str]:
        """The next run, unchanged."""
        if self._reached():
            return []
        again = self.run()
        return [*self.harm(again, before), *([] if again.ok else [f"the next run failed: {again.text}"])]

    def _reached(self) -> bool:
        """Had the first run done all that it was for, when it was cut off? A rebuild that is run again is another."""
        if self.job.name in ("rebuild", "destroy"):
            with self.api.lock:
                there = set(self.api.state.vms) == {101, *self.foreign}
            return there and swap.marker(self.config()) is None and SYSTEM_BORN not in self.volumes().values()
        if self.job.name == "rollback":
            return swap.stage(self.config()) is swap.Stage.IDLE
        return False

    def _settled(self, before: NodeState) -> list[str]:
        """A last deploy finds nothing to do."""
        wrong = self.unfinished()
        last = self.run("create")
        wrong += self.harm(last, before)
        if not last.ok:
            wrong.append(f"the last deploy failed: {last.text}")
        elif last.did:
            wrong.append(f"the last deploy still did {last.did} things")
        return wrong


def _of_others(entries: Sequence[str]) -> list[str]:
    return [entry for entry in entries if "node=pve1" not in entry.split(",")]


def _unclear(outcome: Outcome) -> list[str]:
    """What is not as a message has to be: which host, and what about it."""
    if not outcome.heard:
        return ["it failed without a word"]
    if not re.match(r"(waits for )?(pve1|gpu01)\b.*\S", outcome.first):
        return ["the message does not begin with the host"]
    return ["the message is a traceback"] if "Traceback" in outcome.text else []


@contextmanager
def _listening(outcome: Outcome) -> Iterator[None]:
    """Collect what pyinfra shows, without its colours and the host's prefix."""

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = re.sub(r"\x1b\[[0-9;]*m", "", record.getMessage())
            line = re.sub(r"^\s*\[(?:gpu01\]|pve1\] ) ", "", text)
            outcome.told.append(line)
            if record.levelno >= logging.ERROR:
                outcome.heard.append(line)

    ear = Ear()
    logger = logging.getLogger("pyinfra")
    level = logger.level
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(ear)
        logger.setLevel(level)


# What a good run does, from which the faults are made.


@dataclass(frozen=True)
class Call:
    """One change of a good run: the so-many-eth request (from 0) of this method and path."""

    method: str
    path: str
    number: int
    parameters: tuple[str, ...]

    @property
    def pattern(self) -> str:
        return f"^{re.escape(self.path)}$"

    @property
    def name(self) -> str:
        which = f" no. {self.number + 1}" if self.number else ""
        keys = [key for key in self.parameters if key not in ("digest", "vmid", "node")]
        what = f" {','.join(keys)}" if len(keys) <= 2 and self.path.endswith("/config") else ""
        return f"{self.method} {self.path.removeprefix('/nodes/pve1')}{what}{which}"


@dataclass(frozen=True)
class Recording:
    """`stations`: requests before which something had changed since the request before."""

    changes: list[Call]
    tasks: list[str]
    requests: int
    stations: list[int]
    names: list[str]


def record(world: World, job: str) -> Recording:
    """A run of the job in which nothing goes wrong."""
    world.restore(job)
    calls = len(world.api.calls)
    with world.api.lock:
        tasks = {task.upid for task in world.api.state.tasks}
    pictures: list[object] = []
    world.look = lambda: pictures.append(world.picture())
    outcome = world.run()
    assert outcome.ok, outcome.text
    seen: Counter[tuple[str, str]] = Counter()
    changes = []
    for call in world.api.calls[calls:]:
        if call.agent == "gpulab" and call.method != "GET":
            changes.append(Call(call.method, call.path, seen[call.method, call.path], tuple(sorted(call.parameters))))
        seen[call.method, call.path] += 1
    with world.api.lock:
        begun = [task.type for task in world.api.state.tasks if task.upid not in tasks]
    moved = [n for n in range(1, len(pictures) + 1) if n == 1 or pictures[n - 1] != pictures[n - 2]]
    names = [f"{call.method} {call.path}" for call in world.api.calls[calls:] if call.agent == "gpulab"]
    return Recording(changes, begun, len(pictures), moved, names)

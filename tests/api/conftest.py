# SPDX-License-Identifier: MIT
"""A node's API on loopback (fakepve behind the rehearsal's front), and a pyinfra state to run single steps in."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pyinfra.api import Config, FunctionCommand, State
from pyinfra.api.state import StateStage
from pyinfra.context import ctx_host, ctx_state

from inventory import Node
from inventory.resolve import resolve
from inventory.schema import Passthrough, PassthroughDevice
from inventory.secrets import Secrets
from operations import plan, record
from operations.proxmox import access
from rehearsal.pve.testing import FakeLab

PASSTHROUGH = Passthrough(devices=[PassthroughDevice(address="0000:01:00")])
GUEST = {
    "node": "pve1",
    "vmid": 101,
    "address": "192.0.2.101/24",
    "gateway": "192.0.2.1",
    "ssh_public_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGK1gMYgqz1DlJ3IzjR3G1Jc8g2oP6ZQHq6XhQ3vTn1v a@b",
    "image": {
        "url": "https://images.example/debian-13.qcow2",
        "checksum": "sha256:" + 64 * "a",
        "filename": "debian-13.qcow2",
    },
    "memory_mib": 2048,
    "cores": 2,
}


@pytest.fixture(scope="session")
def _fake() -> Iterator[FakeLab]:
    with FakeLab() as fake:
        yield fake


@pytest.fixture
def api(_fake: FakeLab) -> FakeLab:
    """The node as it is after installation, with one operator token."""
    _fake.reset()
    _fake.set_content("local", "iso,vztmpl,backup,import,snippets")
    # The role that `make bootstrap` makes, in place of the double's own.
    node = Node(name="pve1", ssh_hostname="192.0.2.11", passthrough=PASSTHROUGH)
    for path in access.paths(node):
        _fake.grant(_fake.user, path, " ".join(access.privileges(9)))
    return _fake


@dataclass
class Bench:
    """One guest of one node, and the means to run a step for it."""

    state: State
    host: Any
    folder: Path

    def commands(self, step: Any, **arguments: Any) -> list[Any]:
        """What the step would do now; nothing is executed."""
        with ctx_state.use(self.state), ctx_host.use(self.host):
            return list(step._inner(**arguments))

    def apply(self, step: Any, **arguments: Any) -> int:
        """Execute the step as pyinfra would; the number of commands that ran."""
        count = 0
        with ctx_state.use(self.state), ctx_host.use(self.host):
            for command in step._inner(**arguments):
                assert isinstance(command, FunctionCommand)
                assert command.execute(self.state, self.host, {}) is not False, record.of_run(self.state).failures
                count += 1
        return count

    @property
    def plan(self) -> str:
        return plan.of_run(self.state).render([self.host.name])


@pytest.fixture
def bench(api: FakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return make_bench(api, tmp_path, monkeypatch)


@pytest.fixture
def bench_of(api: FakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    """A bench whose guest differs from the usual one in the given keys."""
    return lambda **changes: make_bench(api, tmp_path, monkeypatch, **changes)


def make_bench(api: FakeLab, folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Bench:
    monkeypatch.setenv("GPULAB_RUNS", str(folder / "runs"))
    state_dir = folder / "state"
    (state_dir / "ca").mkdir(parents=True, exist_ok=True)
    shutil.copy(api.ca, state_dir / "ca" / "pve1.pem")
    Secrets(state_dir).put("pve1", "api_token", f"{api.user}!{api.token_name}={api.token}")
    node = {
        "ssh_hostname": "192.0.2.11",
        "state_dir": str(state_dir),
        "api": {"host": api.host, "port": api.port, "timeout_s": 10},
        "passthrough": {"devices": [{"address": "0000:01:00"}], "hugepages": {"size": "2M", "count": 2048}},
    }
    guest = {**GUEST, "state_dir": str(state_dir), **changes}
    path = folder / "lab.py"
    path.write_text(f"nodes = [('@node/pve1', {node!r})]\nguests = [('@guest/gpu01', {guest!r})]\n")
    state = State(resolve(path, {}), Config())
    state.set_stage(StateStage.Execute)
    return Bench(state, state.inventory.get_host("gpu01"), folder)

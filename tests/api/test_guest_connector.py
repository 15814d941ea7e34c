# SPDX-License-Identifier: MIT
"""The guest's connector: absent, present and unreachable, and what it refuses."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import pytest
from pyinfra.api import Config, State, StringCommand
from pyinfra.api.exceptions import ConnectError
from pyinfra.api.state import StateStage
from pyinfra_cli.exceptions import CliError

from inventory.resolve import resolve
from operations.proxmox import host_keys

from .conftest import Bench


def closed_port() -> int:
    """A loopback port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def planning(bench: Bench) -> Any:
    """The guest's connector in a run that has not begun to execute."""
    state = State(resolve(bench.folder / "lab.py", {}), Config())
    state.set_stage(StateStage.Connect)
    return state.inventory.get_host("gpu01").connector


def test_absent_guest_is_planned_from_nothing(bench: Bench) -> None:
    connector = planning(bench)
    connector.connect()

    assert connector.assumed
    done, output = connector.run_shell_command(StringCommand("rm", "-rf", "/"))
    assert (done, output.stdout_lines, connector.remote_commands) == (True, [], 0)
    assert connector.api_requests == 1


@pytest.mark.parametrize(("running", "tags"), [(False, "gpulab"), (True, "somebody-else")])
def test_stopped_or_foreign_vm_is_not_contacted(api: Any, bench: Bench, running: bool, tags: str) -> None:
    api.add_vm(101, running=running, name="gpu01", tags=tags)
    connector = planning(bench)
    connector.connect()

    assert connector.assumed


def test_node_that_refuses_is_named_once(api: Any, bench: Bench) -> None:
    api.revoke_token()

    with pytest.raises(ConnectError, match=r"^waits for pve1: the API refuses the token"):
        planning(bench).connect()


def test_running_guest_that_cannot_be_reached_fails_in_the_plan_too(
    api: Any, bench_of: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(ssh_hostname="127.0.0.1", ssh_port=closed_port())
    host_keys.pin(bench.folder / "state", *_address(bench), ["ssh-ed25519 AAAA"])
    api.add_vm(101, running=True, name="gpu01", tags="gpulab")
    _long_since(monkeypatch)

    with pytest.raises(ConnectError, match=r"gpu01 runs \(VM 101 on pve1\) and cannot be reached: .*Could not connect"):
        planning(bench).connect()


def test_guest_without_pinned_key_is_asked_through_its_agent(
    api: Any, bench_of: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = bench_of(ssh_hostname="127.0.0.1", ssh_port=closed_port())
    api.add_vm(101, running=True, name="gpu01", tags="gpulab")  # its agent is off
    _long_since(monkeypatch)

    with pytest.raises(ConnectError, match=r"cannot be reached: .*agent"):
        planning(bench).connect()
    assert host_keys.known(bench.folder / "state", *_address(bench)) == []


def test_node_without_api_is_what_the_guest_waits_for(bench: Bench) -> None:
    text = (bench.folder / "lab.py").read_text()
    (bench.folder / "lab.py").write_text(text.replace("'port': ", f"'port': {closed_port()} or "))

    with pytest.raises(ConnectError, match=r"waits for pve1: the API at https://127.0.0.1:\d+ does not answer"):
        planning(bench).connect()


def test_wrong_inventory_stops_before_any_connection(bench: Bench) -> None:
    text = (bench.folder / "lab.py").read_text()
    (bench.folder / "lab.py").write_text(text.replace("'vmid'", "'vmdi'"))

    with pytest.raises(CliError, match="gpu01: vmdi = 101: unknown key; did you mean `vmid`"):
        planning(bench)


def test_limit_that_matches_nothing_is_refused(bench: Bench) -> None:
    state = State()

    with pytest.raises(CliError, match="--limit matches no host"):
        state.init(resolve(bench.folder / "lab.py", {}), Config(), initial_limit=[])


def test_unknown_host_key_is_never_accepted(bench: Bench) -> None:
    state = State(resolve(bench.folder / "lab.py", {}), Config())

    with pytest.raises(ConnectError, match=r"no host key is known for 192\.0\.2\.11"):
        state.inventory.get_host("pve1").connector.connect()


def _address(bench: Bench) -> tuple[str, int]:
    guest = planning(bench).lab.guests["gpu01"]
    return guest.ssh_hostname, guest.ssh_port


def _long_since(monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM was started longer ago than a boot may take, so nobody waits for it."""
    from operations.proxmox import vm

    read = vm.read_state

    def long_running(*arguments: Any) -> Any:
        found = read(*arguments)
        return None if found is None else vm.VmState(found.status, 10_000, found.lock, found.config)

    monkeypatch.setattr(vm, "read_state", long_running)

# SPDX-License-Identifier: MIT
"""One pyinfra run: whose part a host has in it, how its failure is contained, when the plan is printed.

`deploy.py` and `rebuild.py` do their work inside `with run.of_host() as part`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from pyinfra import context
from pyinfra.api import Host, State
from pyinfra.api.output import echo
from pyinfra.api.state import StateStage

import inventory
from inventory import GpulabError, Guest, Lab, Node
from operations import plan, record, step


@dataclass(frozen=True)
class Part:
    """What one host is in this run: exactly one of `node` and `guest` is set."""

    lab: Lab
    node: Node | None
    guest: Guest | None


@dataclass
class Run:
    """What the run knows across hosts: whose deploy code has been read, and whether the plan is printed."""

    prepared: set[str] = field(default_factory=set)
    printed: bool = False


_runs: WeakKeyDictionary[State, Run] = WeakKeyDictionary()


def current(state: State) -> Run:
    """The run of a state; the run record starts with it."""
    if state not in _runs:
        _runs[state] = Run()
        record.of_run(state)
        if not sys.stdin.isatty():
            # Without -y pyinfra asks whether to go on when a host has failed; nobody is there to answer.
            state.config.FAIL_PERCENT = None
            state.should_raise_failed_hosts = None
    return _runs[state]


@contextmanager
def of_host() -> Iterator[Part]:
    """The deploy code of one host: a GpulabError ends it for this host alone."""
    state: State = context.ctx_state.get()
    host: Host = context.ctx_host.get()
    lab = inventory.of_run(state)
    run = current(state)
    try:
        yield Part(lab, lab.nodes.get(host.name), lab.guests.get(host.name))
    except GpulabError as error:
        plan.of_run(state).add(
            plan.Entry(host.name, error.brief, tuple(str(error).splitlines()[1:]), plan.Kind.REFUSED)
        )
        step.refuse(state, host, error)
        run.prepared.add(host.name)
        _print_plan(state, run, failed=host)
        state.fail_hosts({host})
    else:
        run.prepared.add(host.name)
        _print_plan(state, run)


def _print_plan(state: State, run: Run, failed: Host | None = None) -> None:
    """Print gpulab's plan once the last host's deploy code has been read; with `-y` there is no plan."""
    if run.printed or not state.should_check_for_changes() or state.current_stage != StateStage.Prepare:
        return
    waiting = {host.name for host in state.active_hosts} - run.prepared - ({failed.name} if failed else set())
    if waiting:
        return
    run.printed = True
    names = [host.name for host in state.inventory if host.name in run.prepared or host in state.failed_hosts]
    for host in state.failed_hosts:
        if host.name not in run.prepared:
            reason = record.of_run(state).failures.get(host.name, "could not connect")
            plan.of_run(state).add(plan.Entry(host.name, reason, (), plan.Kind.REFUSED))
    echo(f"--> gpulab's plan:\n{plan.of_run(state).render(names)}", err=True)


@step.step
def nodes_ready() -> step.Commands:
    """
    A line that every host crosses together: a guest whose node has failed ends here, at once.

    pyinfra orders steps by their place in each host's own list. This step stands in everybody's list, so that
    what follows on a guest comes after everything that stands before it on the nodes.
    """
    state: State = context.ctx_state.get()
    host: Host = context.ctx_host.get()
    guest = inventory.of_run(state).guests.get(host.name)
    if guest is None:
        step.noop("a node waits for nobody")
        return
    require_node(state, guest)
    step.noop(f"{guest.node} is ready" if _in_run(state, guest.node) else f"{guest.node} is not part of this run")
    yield from ()


@step.step
def services_settled() -> step.Commands:
    """
    The end of the services: a guest fails here when one of them did not come to be as declared.

    Each of them runs with `_ignore_errors`, so that those behind it still get theirs.
    """
    state: State = context.ctx_state.get()
    host: Host = context.ctx_host.get()
    reason = record.of_run(state).failures.get(host.name)
    if reason is not None:
        raise GpulabError(f"{host.name}: not every service is as declared", reason)
    step.noop("every service took its declaration")
    yield from ()


def require_node(state: State, guest: Guest) -> None:
    """
    Raises:
        GpulabError: the guest's node has failed in this run.
    """
    failed = {host.name for host in state.failed_hosts}
    reason = record.of_run(state).failures.get(guest.node)
    if guest.node in failed or reason is not None:
        why = (reason or "it failed").removeprefix(f"{guest.node}: ")
        raise GpulabError(f"waits for {guest.node}: {why}")


def _in_run(state: State, name: str) -> bool:
    return name in {host.name for host in state.active_hosts}

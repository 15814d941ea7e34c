# SPDX-License-Identifier: MIT
"""`@step`: a pyinfra operation that records its plan, fails its own host only, and says why it does nothing.

pyinfra ends the whole run when an operation raises while operations execute. A step may raise GpulabError
at any time: in the planning phase the host's deploy stops there (see `operations.run`), in the execution phase
the error becomes a failed command of this one host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import wraps
from typing import Any, ParamSpec

from pyinfra import context, host, logger, state
from pyinfra.api import FunctionCommand, Host, State, operation
from pyinfra.api.command import PyinfraCommand
from pyinfra.api.exceptions import PyinfraError
from pyinfra.api.operation import OperationMeta
from pyinfra.api.output import format_text
from pyinfra.api.state import StateStage

from inventory import GpulabError
from operations import plan, record
from operations.facts import JsonFact

P = ParamSpec("P")
Commands = Generator[PyinfraCommand | str, None, None]


def step(function: Callable[P, Commands]) -> Callable[..., OperationMeta]:
    """Make a pyinfra operation of a generator that may raise GpulabError.

    Inside: read facts with `read()`, decide with pure functions, then either `noop(reason)` and return, or
    `changes(subject, lines)` and yield commands. Call it with `name=`, as every operation. A mutation that is a
    Python function is yielded as `call(function, ...)`.
    """

    @operation()
    @wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Commands:
        try:
            yield from function(*args, **kwargs)
        except GpulabError as error:
            if state.current_stage < StateStage.Execute:
                raise
            yield FunctionCommand(refuse, (error,), {})

    # pyinfra-testing and nested calls run the plain generator.
    guarded._inner = function
    return guarded


def refuse(state: State, host: Host, error: GpulabError) -> bool:
    """Fail one host with a readable message."""
    lines = str(error).splitlines()
    logger.error(f"{host.print_prefix}{format_text(lines[0], 'red')}")
    for line in lines[1:]:
        logger.error(f"{host.print_prefix}{line}")
    record.note_failure(state, host, error.brief)
    return False


def call(function: Callable[..., None], *args: Any, **kwargs: Any) -> FunctionCommand:
    """A command that runs `function(*args, **kwargs)` on the control machine when the step executes.

    A GpulabError of the function fails this host; its message is shown, not a traceback. Arguments are never
    printed, so they may hold secrets.
    """

    def guarded(state: State, host: Host) -> bool:
        try:
            function(*args, **kwargs)
        except GpulabError as error:
            return refuse(state, host, error)
        return True

    guarded.__name__ = function.__name__
    return FunctionCommand(guarded, (), {})


def read(fact: type[JsonFact], **arguments: Any) -> Any:
    """The fact's value, never pyinfra's silent default: our facts default to None.

    For a guest that does not exist yet it is the fact's `absent` value, and nothing is asked.

    Raises:
        GpulabError: the host did not answer or its answer could not be understood.
    """
    if assumed():
        return fact.absent
    try:
        value = host.get_fact(fact, **arguments)
    except PyinfraError:
        # pyinfra raises "No hosts remaining" through the operation when the last host fails here.
        value = None
    if value is None:
        raise GpulabError(f"{host.name}: could not read {fact.__name__}", "The lines above show what the host said.")
    return value


def noop(reason: str) -> None:
    """Say why nothing has to be done (shown with -v)."""
    host.noop(reason)


def changes(subject: str, lines: tuple[str, ...] = ()) -> None:
    """Record what this host is about to get."""
    _record(plan.Entry(host.name, subject, lines, assumed=assumed()))


def reboots(reason: str) -> None:
    """Record that this host is about to be rebooted."""
    _record(plan.Entry(host.name, "reboot", (reason,), plan.Kind.REBOOT, assumed()))


def waits(subject: str, lines: tuple[str, ...] = ()) -> None:
    """Record what this host will wait for, once what can be done has been done."""
    _record(plan.Entry(host.name, subject, lines, plan.Kind.WAITS, assumed()))


def notes(subject: str, lines: tuple[str, ...] = ()) -> None:
    """Record what this host's admin should know and no run will change."""
    _record(plan.Entry(host.name, subject, lines, plan.Kind.NOTE, assumed()))


def assumed() -> bool:
    """Is this host planned from nothing, because it does not exist yet?"""
    return bool(getattr(host.connector, "assumed", False))


def _record(entry: plan.Entry) -> None:
    plan.of_run(context.ctx_state.get()).add(entry)

# SPDX-License-Identifier: MIT
"""The wait for a reboot: only another boot id counts, and the deadline ends it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from pyinfra.api import StringCommand
from pyinfra.connectors.util import CommandOutput, OutputLine

from inventory import GpulabError
from operations import reboot


@dataclass
class FakeHost:
    """Answers each question for the boot id with the next of `answers`; None: the connection breaks."""

    answers: list[str | None]
    accepts: bool = True
    name: str = "pve1"
    sent: list[str] = field(default_factory=list)
    refuses: list[str] = field(default_factory=list)
    current_op_global_arguments: dict[str, Any] | None = None

    @property
    def connector(self) -> FakeHost:
        return self

    def reconnect(self, deadline_s: float) -> None:
        if self.refuses:
            raise GpulabError(self.refuses.pop(0))

    def run_shell_command(self, command: StringCommand, **arguments: Any) -> tuple[bool, CommandOutput]:
        self.sent.append(str(command))
        if len(self.sent) == 1:
            return self.accepts, CommandOutput([OutputLine("stderr", "Failed to start transient timer unit")])
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise EOFError
        return True, CommandOutput([OutputLine("stdout", answer)])


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10_000))
    monkeypatch.setattr(reboot.time, "monotonic", lambda: float(next(clock)))
    monkeypatch.setattr(reboot.time, "sleep", lambda seconds: None)


def test_wait_ends_with_the_first_answer_of_another_boot() -> None:
    host = FakeHost(answers=["old", None, "old", "new", "old"], refuses=["no SSH"])

    reboot.reboot_and_wait(host, "old", 100)

    assert "systemctl reboot" in host.sent[0]
    assert host.answers == ["old"]


def test_node_that_never_goes_down_is_told_apart_at_the_deadline() -> None:
    with pytest.raises(GpulabError) as caught:
        reboot.reboot_and_wait(FakeHost(answers=["old"]), "old", 20)

    assert caught.value.brief == "pve1: not back 20 s after its reboot"
    assert caught.value.details == "Last answer: still the old boot"


def test_node_that_does_not_come_back_shows_the_last_answer() -> None:
    with pytest.raises(GpulabError, match="Last answer: no SSH after 5 s"):
        reboot.reboot_and_wait(FakeHost(answers=["old"], refuses=100 * ["no SSH after 5 s"]), "old", 20)


def test_refused_order_is_an_error_at_once() -> None:
    with pytest.raises(GpulabError, match="pve1: its systemd refused the reboot\nFailed to start transient"):
        reboot.reboot_and_wait(FakeHost(answers=["new"], accepts=False), "old", 20)

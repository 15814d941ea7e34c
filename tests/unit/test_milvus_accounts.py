# SPDX-License-Identifier: MIT
"""How Milvus' accounts are changed while it still counts on the proxy of a server that was killed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from operations.containers.milvus.remote import accounts

DEAD = "UpdateCredentialCache failed, proxyID = 6, err = stack trace: …"


def failing(*errors: str) -> Callable[[], int]:
    """Raises each error once; then gives how often it was called."""
    calls: list[int] = []

    def act() -> int:
        calls.append(1)
        if len(calls) <= len(errors):
            raise RuntimeError(errors[len(calls) - 1])
        return len(calls)

    return act


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of waiting takes none."""
    now = [0.0]
    monkeypatch.setattr(accounts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(accounts.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_dead_proxy_is_waited_for() -> None:
    assert accounts.patiently(failing(DEAD, DEAD), 60) == 3


def test_dead_proxy_is_not_waited_for_longer_than_it_may_take() -> None:
    with pytest.raises(RuntimeError, match="proxyID"):
        accounts.patiently(failing(*[DEAD] * 100), 60)


def test_other_errors_are_told_at_once() -> None:
    with pytest.raises(RuntimeError, match="permission deny"):
        accounts.patiently(failing("permission deny to ml", DEAD), 60)

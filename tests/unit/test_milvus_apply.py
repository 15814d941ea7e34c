# SPDX-License-Identifier: MIT
"""When Milvus' collections count as there: a server that has just started is not asked too early."""

from __future__ import annotations

from typing import Any

import pytest

from operations.containers.milvus.remote import apply
from operations.containers.milvus.remote.accounts import Failed

LATE = "Deadline Exceeded"


class Client:
    """Its collection is in memory and does not answer the first requests."""

    def __init__(self, late: int) -> None:
        self.late = late
        self.asked: list[tuple[str, list[str]]] = []

    def query(self, name: str, filter: str, output_fields: list[str], timeout: float) -> list[dict[str, Any]]:
        self.asked.append((name, output_fields))
        if len(self.asked) <= self.late:
            raise RuntimeError(LATE)
        return [{"count(*)": 7}]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of waiting takes none."""
    now = [0.0]
    monkeypatch.setattr(apply.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(apply.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_collection_that_answers_is_asked_once() -> None:
    client = Client(late=0)
    apply.answered(client, "spectra", 240)
    assert client.asked == [("spectra", ["count(*)"])]


def test_collection_is_waited_for_until_it_answers() -> None:
    client = Client(late=9)
    apply.answered(client, "spectra", 240)
    assert len(client.asked) == 10


def test_collection_that_never_answers_is_told_with_the_last_error() -> None:
    with pytest.raises(Failed, match=f"^it does not answer within 240 s: {LATE}$"):
        apply.answered(Client(late=10_000), "spectra", 240)


def test_run_ends_when_every_collection_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    clients = {"astro": Client(late=3), "ml": Client(late=1)}
    monkeypatch.setattr(apply, "connect", lambda uri, user, password, database: clients[database])
    monkeypatch.setattr(apply, "collection", lambda client, wanted: None)
    monkeypatch.setattr(apply, "keep", lambda content: None)
    monkeypatch.setattr(apply, "root_of", lambda uri, password, deadline_s: None)
    monkeypatch.setattr(apply, "accounts", lambda root, uri, databases, passwords: None)
    monkeypatch.setattr(apply, "remove", lambda root, names: None)
    order: dict[str, Any] = {"uri": "http://127.0.0.1:19530", "databases": list(clients), "digests": {}, "remove": []}
    order |= {"deadline_s": 60, "ready_s": 240}
    order["collections"] = [{"database": database, "name": "spectra"} for database in clients]

    apply.apply(order, {"root": "word"})

    assert {database: len(client.asked) for database, client in clients.items()} == {"astro": 4, "ml": 2}

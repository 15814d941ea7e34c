# SPDX-License-Identifier: MIT
"""Does Milvus let in whom it should and nobody else, and hold what is declared? What all services have in common:
test_services.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from inventory import Guest
from inventory.access import milvus_name, tenants_of
from inventory.services import Collection, Milvus
from verify.containers import indexes
from verify.containers.running import running
from verify.containers.test_card import users
from verify.observations import Observation
from verify.verdicts import Broken, not_run

pytestmark = pytest.mark.on("milvus")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: How Milvus refuses somebody whom it does not know, and somebody who may not do it.
UNKNOWN, FORBIDDEN = "UNAUTHENTICATED", "PERMISSION_DENIED"
#: Seconds within which a search has to answer.
SEARCH_S = 10.0
FILE = "/etc/gpulab/milvus.json"
#: Rows from which a collection must have an index in memory: Milvus makes none for a segment of less than 1024 rows,
#: and merges ten small ones.
INDEXED_ROWS = 10 * 1024


@pytest.fixture
def wanted(guest: Guest) -> Milvus:
    assert guest.services.milvus is not None
    return guest.services.milvus


@pytest.mark.critical
@pytest.mark.promise("containers.milvus.healthy", fix=DEPLOY + "; docker logs milvus on {host} says more")
def test_milvus_is_healthy(
    guest: Guest, wanted: Milvus, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    running(containers, "milvus")
    assert milvus["health"] == "OK", (
        f"{guest.name}: http://127.0.0.1:{wanted.metrics_port}/healthz says {milvus['health']!r}, expected OK"
    )
    assert not milvus["error"], f"{guest.name}: Milvus cannot be asked: {milvus['error']}"
    seen(f"version {milvus['version']}")


@pytest.mark.critical
@pytest.mark.promise("containers.milvus.authorization", fix=DEPLOY)
def test_nobody_gets_in_unknown(
    guest: Guest, wanted: Milvus, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    """Whoever is let in with root's published password may do everything."""
    found = asked(containers, milvus)
    let_in = [who for who, told in found["strangers"].items() if told["status"] != UNKNOWN]
    assert not let_in, f"{guest.name}: Milvus answers {' and '.join(let_in)}, expected a refusal"
    assert not found["unguarded"], (
        f"{guest.name}: 127.0.0.1:{wanted.metrics_port} answers {', '.join(found['unguarded'])} without a login: "
        "whoever has a shell on the guest reads all rows and makes users"
    )
    if found["root"]["status"] != "OK":
        raise Broken(
            f"{guest.name}: root's password of the lab's secrets does not let it in: {found['root']['said']}",
            "put root's present password into the lab's secrets as milvus.root; then " + DEPLOY,
        )
    seen(f"refused: {', '.join(found['strangers'])}")


@pytest.mark.critical
@pytest.mark.promise("containers.milvus.tenants", fix=DEPLOY)
def test_tenants_are_at_home_in_their_databases(
    guest: Guest, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    """By what Milvus does with a tenant's requests: a right that is named otherwise in another version is no matter."""
    found = asked(containers, milvus)
    names = databases(guest)
    for name in names:
        tenant = found["tenants"][name]
        login = tenant["login"]
        assert login["status"] == "OK", (
            f"{guest.name}: {name} does not get in to its database {name} with its password of the lab's secrets: "
            f"{login['said']}"
        )
        lacking = [what for what, told in tenant["own"].items() if told["status"] in (UNKNOWN, FORBIDDEN)]
        assert not lacking, f"{guest.name}: {name} may not {', '.join(lacking)} in its own database {name}"
        roles = tenant["roles"]
        if roles is not None:
            expected = f"gpulab_{name}"
            assert roles == [expected], (
                f"{guest.name}: {name} has the roles {', '.join(roles) or 'none'}, expected {expected} alone"
            )
    seen(", ".join(names) or "no tenant may use it")


@pytest.mark.critical
@pytest.mark.promise("containers.milvus.isolation", fix=DEPLOY)
def test_tenants_do_nothing_in_each_others_databases(
    guest: Guest, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    found = asked(containers, milvus)
    for name in databases(guest):
        at_home(found, name)
        wrong = [what for what, told in found["tenants"][name]["managing"].items() if told["status"] != FORBIDDEN]
        assert not wrong, f"{guest.name}: {name} may {', '.join(wrong)}, expected a refusal"
    for where, attempts in found["foreign"].items():
        name, _, other = where.partition(" in ")
        wrong = [what for what, told in attempts.items() if told["status"] != FORBIDDEN]
        assert not wrong, f"{guest.name}: {name} may {', '.join(wrong)} in database {other}, expected a refusal"
    seen(f"{len(found['foreign'])} pairs" if found["foreign"] else "one tenant at most; no rights on accounts")


@pytest.mark.major
@pytest.mark.promise("containers.milvus.collections", fix=DEPLOY)
def test_declared_collections_are_there(
    guest: Guest, wanted: Milvus, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    told = []
    for each, found in declared(wanted, asked(containers, milvus)):
        label = f"{guest.name}: collection {full_name(each)}"
        assert found["told"]["status"] == "OK", f"{label}: {found['told']['said'] or found['told']['status']}"
        if found["dimension"] != each.dimension:
            raise Broken(
                f"{label}: its vectors have {found['dimension'] or 'no'} dimensions, expected {each.dimension}",
                "declare it under another name and move the rows; no deploy changes a dimension",
            )
        assert found["loaded"], f"{label} is not in memory, expected it to be loaded: a search of it fails"
        told.append(f"{full_name(each)}: {'?' if found['rows'] is None else found['rows']} rows")
    seen(", ".join(told) or "none declared")


@pytest.mark.major
@pytest.mark.promise("containers.milvus.indexes", fix=DEPLOY)
def test_indexes_are_as_declared(
    guest: Guest, wanted: Milvus, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    told = []
    for each, found in declared(wanted, asked(containers, milvus)):
        expected = indexes.built(wanted.indexes[each.index])
        index = of_existing(each, found)["index"]
        assert index is not None, f"{guest.name}: collection {full_name(each)} has no index, expected {each.index}"
        wrong = [
            f"{key} is {index.get(key, 'not told')}, expected {value}"
            for key, value in expected.items()
            if index.get(key) != value
        ]
        assert not wrong, f"{guest.name}: the index of collection {full_name(each)}: {'; '.join(wrong)}"
        told.append(f"{full_name(each)}: {expected['index_type']}")
    seen(", ".join(told) or "none declared")


@pytest.mark.critical
@pytest.mark.usefixtures("guest_sees_gpu")
@pytest.mark.promise("containers.milvus.gpu", "gpu", fix="docker restart milvus on {host}; its log says more")
def test_milvus_holds_gpu_indexes_on_the_gpu(
    guest: Guest,
    wanted: Milvus,
    containers: Observation,
    milvus: Observation,
    nvidia: Observation,
    seen: Callable[[str], None],
) -> None:
    """As the driver has it. An index that is adapted for the CPU is built on the GPU and searched without it."""
    expected = [
        f"{full_name(each)} ({found['indexed']} rows, {found['index']['index_type']})"
        for each, found in declared(wanted, asked(containers, milvus))
        if found["loaded"] and found["indexed"] >= INDEXED_ROWS and searched_on_gpu(found["index"])
    ]
    if not expected:
        seen("no collection with an index for the GPU in memory")
        return
    held = [each for each in users(nvidia, containers) if each["share"] == "milvus"]
    assert held, (
        f"{guest.name}: Milvus has no process on the GPU, expected one that holds the indexes of {', '.join(expected)}"
    )
    memory = ", ".join("?" if each["memory_mib"] is None else f"{each['memory_mib']} MiB" for each in held)
    seen(f"{', '.join(expected)}: {memory} of the GPU's memory")


@pytest.mark.minor
@pytest.mark.promise("containers.milvus.profiles", fix=DEPLOY)
def test_profiles_are_there_for_users_programs(
    guest: Guest, wanted: Milvus, milvus: Observation, seen: Callable[[str], None]
) -> None:
    found, expected = milvus["profiles"], indexes.shown(wanted)
    assert found is not None, f"{guest.name}: {FILE} is missing or no JSON"
    there = {name: as_shown(profile) for name, profile in found.items()}
    wrong = [name for name in sorted(there.keys() | expected.keys()) if there.get(name) != expected.get(name)]
    assert not wrong, f"{guest.name}: {FILE} tells users otherwise than declared of {', '.join(wrong)}"
    seen(", ".join(expected) or "none declared")


@pytest.mark.critical
@pytest.mark.promise("containers.milvus.answers", fix=DEPLOY + "; docker logs milvus on {host} says more")
def test_collections_answer_a_search(
    guest: Guest, wanted: Milvus, containers: Observation, milvus: Observation, seen: Callable[[str], None]
) -> None:
    """As its tenant, with the profile's own parameters."""
    told = []
    for each, found in declared(wanted, asked(containers, milvus)):
        search = of_existing(each, found)["search"]
        if search is None:
            not_run(f"collection {full_name(each)} is not in memory: see containers.milvus.collections")
        assert search["status"] == "OK", (
            f"{guest.name}: a search of collection {full_name(each)} fails: {search['said'] or search['status']}"
        )
        assert search["seconds"] <= SEARCH_S, (
            f"{guest.name}: a search of collection {full_name(each)} took {search['seconds']:.1f} s, "
            f"expected at most {SEARCH_S:.0f} s"
        )
        what = f"{search['found']} found" if found["rows"] else "empty"
        told.append(f"{full_name(each)}: {what} in {search['seconds'] * 1000:.0f} ms")
    seen(", ".join(told) or "none declared")


def asked(containers: Observation, milvus: Observation) -> Observation:
    """What Milvus answered; the check is not run where it could not be asked."""
    running(containers, "milvus")
    if milvus["error"] or milvus["health"] != "OK":
        not_run("Milvus does not answer: see containers.milvus.healthy")
    return milvus


def databases(guest: Guest) -> list[str]:
    """The tenants that may use Milvus, by their names there."""
    return [milvus_name(name) for name in tenants_of(guest, "milvus")]


def at_home(found: Observation, name: str) -> None:
    """End the check where the tenant does not get in at all."""
    if found["tenants"][name]["login"]["status"] != "OK":
        not_run(f"{name} does not get in: see containers.milvus.tenants")


def declared(wanted: Milvus, found: Observation) -> list[tuple[Collection, dict[str, Any]]]:
    """Every declared collection with what was seen of it."""
    for each in wanted.collections:
        at_home(found, milvus_name(each.tenant))
    return [(each, found["collections"][full_name(each)]) for each in wanted.collections]


def of_existing(each: Collection, found: dict[str, Any]) -> dict[str, Any]:
    """What was seen of a collection; the check is not run where there is none."""
    if found["told"]["status"] != "OK":
        not_run(f"there is no collection {full_name(each)}: see containers.milvus.collections")
    return found


def searched_on_gpu(index: Mapping[str, str] | None) -> bool:
    """By what Milvus itself says of it."""
    return index is not None and index["index_type"].startswith("GPU_") and index.get("adapt_for_cpu") != "true"


def full_name(collection: Collection) -> str:
    return f"{milvus_name(collection.tenant)}.{collection.name}"


def as_shown(profile: Mapping[str, Any]) -> dict[str, Any]:
    """A profile of the guest's file in the form of `indexes.shown()`."""
    params = {key: str(value) for key, value in profile.get("params", {}).items()}
    index = {key: str(profile.get(key)) for key in ("index_type", "metric_type")}
    return {"index": {**index, **params}, "search": profile.get("search"), "top_k": profile.get("top_k")}

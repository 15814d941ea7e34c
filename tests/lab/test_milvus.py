# SPDX-License-Identifier: MIT
"""Milvus on a deployed guest, a real server: an upgrade between two versions, one that loses rows, and restores."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

import inventory
from rehearsal import host
from rehearsal.registry import service as registry
from tests.lab.commands import INVENTORY, Deployed

GUEST = "gpu01"
BEFORE, NOW = "milvus-before", "milvus"
ROWS = 500
#: `A` is root's client of the tenant's database.
CLIENT = """
import json, logging, os, sys, time
from pymilvus import MilvusClient
logging.disable()
login = json.load(open("/etc/gpulab/milvus.root.json"))
A = MilvusClient(login["uri"], token="root:" + login["password"], db_name="astro", timeout=30)
def rows():
    return A.query("spectra", filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]
"""
#: Rows go as soon as the answers of the server before are noted, and before it is stopped.
LOSE = """
import glob
there = set(glob.glob("/srv/data/milvus-backups/*/answers.json"))
print("ready", flush=True)
while not set(glob.glob("/srv/data/milvus-backups/*/answers.json")) - there:
    time.sleep(0.01)
A.delete("spectra", filter="id < 400")
"""


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Both versions' images, by name and digest."""
    return registry.prepare(also={BEFORE})


def words(image: str) -> tuple[str, ...]:
    """Words of a run in which Milvus is of this image."""
    declared = inventory.load(INVENTORY).guests[GUEST].services.model_dump(exclude_unset=True)
    value = {**declared, "milvus": {**declared["milvus"], "image": image}}
    return ("--limit", GUEST, "--data", f"services={json.dumps(value)}")


def client(deployed: Deployed, body: str) -> str:
    return deployed.on(GUEST, "/opt/gpulab/milvus-tools/bin/python", "-c", CLIENT + body).strip()


def version(deployed: Deployed) -> str:
    return client(deployed, "print(A.get_server_version())")


def rows(deployed: Deployed) -> int:
    return int(client(deployed, "print(rows())"))


def backups(deployed: Deployed) -> list[str]:
    return deployed.on(GUEST, "ls", "/srv/data/milvus-backups").split()


@pytest.fixture(scope="module")
def older(images: dict[str, str], deployed: Deployed) -> Iterator[Deployed]:
    """The guest with the older server, and rows in the declared collection."""
    deployed.on(GUEST, "sh", "-c", "docker rm --force milvus && rm -rf /srv/data/milvus /srv/data/milvus-backups")
    done = deployed.deploy(*words(images[BEFORE]))
    assert done.status == 0, done.output[-4000:]
    assert version(deployed).startswith("v2.3.3")
    fill = 'A.insert("spectra", [{"id": n, "vector": [n / 7, *[1.0] * 127], "name": f"s{n}"} for n in range(%d)])'
    client(deployed, fill % ROWS)
    assert rows(deployed) == ROWS
    yield deployed
    deployed.on(GUEST, "rm", "-rf", "/srv/data/milvus-backups")


def test_an_upgrade_that_loses_rows_ends_with_the_server_before(older: Deployed, images: dict[str, str]) -> None:
    lose = [*host.enter(GUEST), "/opt/gpulab/milvus-tools/bin/python", "-c", CLIENT + LOSE]
    with subprocess.Popen(lose, stdout=subprocess.PIPE, text=True) as losing:
        assert losing.stdout is not None and losing.stdout.readline() == "ready\n"
        done = older.deploy(*words(images[NOW]))
        assert losing.wait(timeout=30) == 0

    assert done.status == 1
    assert "milvus: collections do not answer as before" in done.output
    assert f"astro.spectra: {ROWS - 400} rows, before {ROWS}" in done.output
    assert "The previous container runs again." in done.output
    (name,) = backups(older)
    assert f"the backup of before lies on the guest in /srv/data/milvus-backups/{name}" in done.output
    deadline = time.monotonic() + 120
    while "starting" in older.on(GUEST, "sh", "-c", "curl -sf http://127.0.0.1:9091/healthz || echo starting"):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert version(older).startswith("v2.3.3")
    assert rows(older) == ROWS - 400

    over = ("--data", "from_backup=newest", "--data", "collection=astro.spectra", "--data", "over=1")
    plan = older.pyinfra("milvus.py", "--dry", "--limit", GUEST, *over)
    assert f"restore astro.spectra of {name} in the place of what is there" in plan.output
    done = older.pyinfra("milvus.py", "-y", "--limit", GUEST, *over)
    assert done.status == 0, done.output[-3000:]
    assert rows(older) == ROWS


def test_a_server_that_does_not_answer_is_not_upgraded(older: Deployed, images: dict[str, str]) -> None:
    older.on(GUEST, "systemctl", "stop", "gpulab-heal.timer")
    older.on(GUEST, "docker", "stop", "milvus")
    try:
        plan = older.plan(*words(images[NOW]))
        assert "the server does not answer, so its collections can't be backed up before the upgrade" in plan.output
        done = older.deploy(*words(images[NOW]))
        assert done.status == 1 and "the server does not answer" in done.output
        assert older.on(GUEST, "docker", "inspect", "--format", "{{.State.Status}}", "milvus") == "exited\n"
        plan = older.plan(*words(images[NOW]), "--data", "upgrade_without_backup=1")
        assert "note: Milvus gets another image without a backup" in plan.output
    finally:
        older.on(GUEST, "docker", "start", "milvus")
        older.on(GUEST, "systemctl", "start", "gpulab-heal.timer")
    done = older.deploy(*words(images[BEFORE]))
    assert done.status == 0, done.output[-3000:]


def test_an_upgrade_keeps_what_collections_answer(older: Deployed, images: dict[str, str]) -> None:
    there = backups(older)
    plan = older.plan(*words(images[NOW]))
    assert "back up all collections of server v2.3.3" in plan.output
    assert f"{images[BEFORE]} -> {images[NOW]}" in plan.output
    assert backups(older) == there

    done = older.deploy(*words(images[NOW]))

    assert done.status == 0, done.output[-4000:]
    assert f"astro.spectra: {ROWS} rows" in done.output
    (name,) = set(backups(older)) - set(there)
    assert name.endswith("-upgrade")
    assert version(older).startswith("v2.3.5")
    assert rows(older) == ROWS
    assert "answer as before" in older.on(GUEST, "gpulab-milvus", "compare", "newest")
    again = older.deploy(*words(images[NOW]))
    assert (again.status, older.changed()) == (0, []), again.output[-3000:]


def test_a_dropped_collection_is_restored_with_its_rows(older: Deployed) -> None:
    client(older, 'A.drop_collection("spectra")')

    done = older.pyinfra("milvus.py", "-y", "--limit", GUEST, "--data", "from_backup=newest")

    assert done.status == 0, done.output[-3000:]
    assert f"astro.spectra: {ROWS} rows restored" in done.output
    assert rows(older) == ROWS
    found = client(older, 'print(A.query("spectra", filter="id == 123", output_fields=["name"])[0]["name"])')
    assert found == "s123"
    again = older.pyinfra("milvus.py", "-y", "-v", "--limit", GUEST, "--data", "from_backup=newest")
    assert (again.status, older.changed()) == (0, [])
    assert "astro.spectra is there already, and stays" in again.output
    assert older.deploy("--limit", GUEST).status == 0
    assert older.changed() == [], "the restored collection is as declared"

    done = older.pyinfra("milvus.py", "-y", "--limit", GUEST, "--data", "label=mine")
    assert done.status == 0, done.output[-3000:]
    assert backups(older)[-1].endswith("-mine")

# SPDX-License-Identifier: MIT
"""What breaks in a guest's Milvus; `test_guest.py` runs these on its lab."""

from __future__ import annotations

import time
from collections.abc import Callable

import inventory
from rehearsal import host
from tests.lab.commands import INVENTORY, Deployed

from .fault import GUEST, Act, Fault, R, S, Words, both, service

#: The driver's own Python, and how a program of root's on the guest logs in.
PYTHON = "/opt/gpulab/milvus-tools/bin/python"
LOGIN = """import json, logging, os, sys, time
from pymilvus import DataType, MilvusClient
logging.disable()
KEPT = json.load(open("/etc/gpulab/milvus.root.json"))["passwords"]
def client(user, database, password=None):
    return MilvusClient("http://127.0.0.1:19530", token=f"{user}:{password or KEPT[user]}", db_name=database)
"""
#: A tenant's declared collection, and one of its own.
DECLARED, OWN = "spectra", "inserted"
#: Rows of the declared collection whose neighbours are known.
ROWS = 20


def asks(script: str) -> Act:
    """A program on the guest that has `client()`; gives what it prints."""
    return lambda deployed: deployed.on(GUEST, PYTHON, "-c", LOGIN + script)


def until(what: str, happened: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.5)


def succeeds(script: str) -> bool:
    return host.run(GUEST, ["sh", "-c", script]).returncode == 0


def of_the_gpu() -> Words:
    """The tenant's collection with an index that a server for the CPU does not know."""
    (collection,) = inventory.load(INVENTORY).guests[GUEST].services.model_dump()["milvus"]["collections"]
    return service("milvus", collections=[{**collection, "index": "spectra-gpu"}])


ACKNOWLEDGED = "/run/acknowledged"
#: Writes down the last row of each batch that Milvus has taken, and nothing of one that it has not.
INSERT = f"""
astro = client("astro", "astro")
schema = astro.create_schema()
schema.add_field("id", DataType.INT64, is_primary=True)
schema.add_field("vector", DataType.FLOAT_VECTOR, dim=8)
params = astro.prepare_index_params()
params.add_index("vector", index_type="HNSW", metric_type="L2", params={{"M": 8, "efConstruction": 32}})
astro.create_collection("{OWN}", schema=schema, index_params=params)
with open("{ACKNOWLEDGED}", "w", buffering=1) as done:
    for first in range(0, 10_000_000, 100):
        rows = [{{"id": number, "vector": [float(number)] * 8}} for number in range(first, first + 100)]
        astro.insert("{OWN}", rows, timeout=5)
        done.write(f"{{first + 100}}\\n")
"""
#: Every row up to the last one that was acknowledged; beyond it there may be those of the batch that was under way.
COMPLETE = f"""
astro = client("astro", "astro")
expected = int(open("{ACKNOWLEDGED}").read().split()[-1])
astro.load_collection("{OWN}")
ask = {{"output_fields": ["count(*)"], "consistency_level": "Strong"}}
found = astro.query("{OWN}", filter=f"id < {{expected}}", **ask)[0]["count(*)"]
print(expected, found)
sys.exit(expected != found)
"""


def killed_while_inserting(deployed: Deployed) -> None:
    """The server's processes killed in the middle of a stream of batches; the engine starts them again."""
    deployed.on(GUEST, "sh", "-ec", f"rm -f {ACKNOWLEDGED}")
    unit = "acknowledged"
    deployed.on(GUEST, "systemd-run", "--quiet", "--collect", f"--unit={unit}", PYTHON, "-c", LOGIN + INSERT)
    until("twenty batches", lambda: succeeds(f"test $(wc -l < {ACKNOWLEDGED}) -ge 20"))
    deployed.on(GUEST, "sh", "-ec", "kill -9 $(docker inspect --format '{{.State.Pid}}' milvus)")
    until("the client's end", lambda: not succeeds(f"systemctl is-active --quiet {unit}"), 120)
    until("a server that answers", lambda: succeeds("curl -sf http://127.0.0.1:9091/healthz"), 120)
    expected, found = str(asks(COMPLETE)(deployed)).split()
    assert expected == found and int(found) >= 2000


FILL = f"""
astro = client("astro", "astro")
astro.upsert("{DECLARED}", [{{"id": n, "vector": [float(n)] + [1.0] * 127}} for n in range({ROWS})])
"""
#: The nearest of the rows: an index and the rows behind it.
NEAREST = f"""
astro = client("astro", "astro")
hits = astro.search("{DECLARED}", data=[[7.2] + [1.0] * 127], limit=1, consistency_level="Strong")
sys.exit(0 if [hit["id"] for hit in hits[0]] == [7] else f"found {{hits}}")
"""
OTHER = "another-password-9"
CHANGED = f'client("root", "default").update_password("root", KEPT["root"], "{OTHER}")'
BACK = f'client("root", "default", "{OTHER}").update_password("root", "{OTHER}", KEPT["root"])'
PUBLISHED = 'client("root", "default").update_password("root", KEPT["root"], "Milvus")'
REVOKED = """
role = ("gpulab_astro", "Global", "CreateCollection", "*")
client("root", "default").revoke_privilege(*role, db_name="astro")
"""
GRANTED = """
client("root", "default").grant_privilege("gpulab_ml", "Collection", "Query", "spectra", db_name="astro")
"""
DROPPED = f"""
root = client("root", "astro")
root.release_collection("{DECLARED}")
for each in root.list_indexes("{DECLARED}"):
    root.drop_index("{DECLARED}", each)
"""


FAULTS = [
    Fault(
        "Milvus killed while inserting",
        S,
        killed_while_inserting,
        mend=both(asks(COMPLETE), asks(f'client("astro", "astro").drop_collection("{OWN}")')),
    ),
    Fault(
        "root's password of Milvus changed by hand",
        R,
        asks(CHANGED),
        says="its root password is not the one in the lab's secrets",
        checks=("containers.milvus.authorization",),
        mend=asks(BACK),
    ),
    Fault(
        "Milvus' published password set again",
        S,
        asks(PUBLISHED),
        checks=("containers.milvus.authorization",),
    ),
    Fault("a tenant's rights taken", S, asks(REVOKED), checks=("containers.milvus.tenants",)),
    Fault("a tenant given rights in another's database", S, asks(GRANTED), checks=("containers.milvus.isolation",)),
    Fault(
        "a tenant's user removed",
        S,
        asks('client("root", "default").drop_user("ml")'),
        checks=("containers.milvus.tenants",),
    ),
    Fault(
        "an index type that the server refuses",
        R,
        asks(FILL),
        says="invalid index type: GPU_CAGRA; the image's Milvus is built for the CPU",
        words=of_the_gpu,
        mend=asks(NEAREST),
    ),
    Fault(
        "a collection's index dropped by hand",
        S,
        both(asks(FILL), asks(DROPPED)),
        checks=("containers.milvus.indexes", "containers.milvus.collections"),
        mend=asks(NEAREST),
    ),
]

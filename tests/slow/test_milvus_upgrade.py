# SPDX-License-Identifier: MIT
"""Milvus upgraded over the same files, between two real servers: what collections answer, and losses that are told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rehearsal.registry.milvus import recipe
from tests.rehearsal.milvus_server import network, serving
from tests.slow.milvus_backups import Guest, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace"),
]

FILL = """
def fill(name, **words):
    make(name, more=[("t", D.INT64, {})], **words)
    A.create_partition(name, "late")
    A.insert(name, [{"key": n, "vector": [n, n % 7, n % 3, 1], "t": n, "d": str(n)} for n in range(600)])
    late = [{"key": n, "vector": [n, n % 7, n % 3, 1], "t": n} for n in range(600, 1000)]
    A.insert(name, late, partition_name="late")
    A.create_alias(name, "alias_of_" + name)
fill("graph")
fill("flat", index=("IVF_FLAT", "IP", {"nlist": 8}))
fill("away", load=False)
make("empty")
"""


def test_an_upgrade_keeps_what_collections_answer_and_a_loss_is_told(tmp_path: Path) -> None:
    with network() as loopback:
        guest = Guest(loopback, tmp_path)
        with serving(recipe.EARLIER, tmp_path, loopback, settings(tmp_path)):
            guest.client("A.create_database('astro')", "default")
            guest.client(FILL)
            guest.done("backup", "--reason", "upgrade")
            guest.done("record", "newest")
            made = guest.manifest()
        assert made["server"].startswith("v2.3.3")
        assert {each["name"]: each["rows"] for each in made["collections"]} == {
            "away": 1000, "empty": 0, "flat": 1000, "graph": 1000,
        }  # fmt: skip

        with serving(recipe.NOW, tmp_path, loopback, settings(tmp_path)):
            version = guest.client("print(json.dumps(A.get_server_version()))")
            assert version.startswith("v2.3.5")
            assert "4 collections answer as before" in guest.done("compare", "newest", "--within", "60")

            guest.client("A.delete('graph', filter='t >= 600')")
            said = guest.refused("compare", "newest").splitlines()
            assert said[0] == "collections do not answer as before"
            assert "astro.graph: 600 rows, before 1000" in said
            assert all(line.startswith("astro.graph: ") for line in said[1:])

            # What the older server wrote, the newer one takes back.
            guest.done("restore", "newest", "astro.graph", "--over")
            assert "4 collections answer as before" in guest.done("compare", "newest")

# SPDX-License-Identifier: MIT
"""The programs of `operations.containers.milvus` before the real server: accounts, rights, collections, indexes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from inventory import GpulabError
from inventory.services import Milvus
from operations.containers.milvus import Passwords, service, wanted
from operations.containers.milvus.remote import client
from rehearsal.registry.milvus import recipe
from tests.rehearsal.milvus_server import network, serving
from tests.unit.test_inventory import IMAGE

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace")

URI = "http://127.0.0.1:19530"
INDEXES = {
    "sky": {"type": "HNSW", "m": 8, "ef_construction": 32},
    "flat": {"type": "HNSW", "m": 4, "ef_construction": 16, "metric": "IP"},
    "gpu": {"type": "GPU_CAGRA"},
}
#: Puts ten rows into a collection, as its tenant.
FILL = """
A.insert("spectra", [{"id": n, "vector": [float(n), 1.0], "name": str(n)} for n in range(10)])
print(A.query("spectra", filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"])
"""
SEARCH = """
hits = A.search("spectra", data=[[7.2, 1.0]], limit=1, output_fields=["name"], consistency_level="Strong")
print(hits[0][0]["entity"]["name"])
"""


@dataclass
class Lab:
    """A server, and a guest's file of logins."""

    loopback: list[str]
    logins: Path
    #: All that the programs printed, and were told in their arguments.
    seen: list[str] = field(default_factory=list)

    def python(self, script: str, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        own = script.replace(client.LOGINS, str(self.logins))
        words = [*self.loopback, sys.executable, "-c", own, *arguments]
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=60, check=False)
        self.seen += [*arguments, done.stdout, done.stderr]
        return done

    def read(self, declared: Milvus, users: list[str]) -> dict[str, Any]:
        collections = wanted.collections(declared)
        named = {user: [each["name"] for each in collections if each["database"] == user] for user in users}
        order = {"uri": URI, "tools": "/nonexistent", "profiles": "/nonexistent", "databases": named}
        done = self.python(service.MilvusFacts.script, json.dumps(order))
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def differences(self, declared: Milvus, passwords: Mapping[str, str]) -> list[str]:
        users = [name for name in passwords if name != "root"]
        found = self.read(declared, users)
        assert not found["error"]
        return wanted.differences(found, users, digests(passwords), wanted.collections(declared), "gpu01")

    def apply(
        self, declared: Milvus, passwords: Mapping[str, str], remove: list[str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        order = {
            "uri": URI,
            "databases": [name for name in passwords if name != "root"],
            "digests": digests(passwords),
            "remove": remove or [],
            "collections": wanted.collections(declared),
            "deadline_s": 20,
            "ready_s": 20,
        }
        return self.python(service._APPLY, json.dumps(order), stdin=json.dumps(dict(passwords)))

    def tenant(self, body: str, user: str, password: str, database: str = "") -> str:
        """What a user's own program prints; the refusal that ended it."""
        words = json.dumps([URI, f"{user}:{password}", database or user])
        start = "import json, logging, sys\nfrom pymilvus import MilvusClient\nlogging.disable()\n"
        start += "uri, token, db = json.loads(sys.argv[1])\nA = MilvusClient(uri, token=token, db_name=db)\n"
        done = subprocess.run(
            [*self.loopback, sys.executable, "-c", start + body, words],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done.stdout.strip() if done.returncode == 0 else done.stderr.strip()


def digests(passwords: Mapping[str, str]) -> dict[str, str]:
    return Passwords(passwords, "storage", "key").digests


def milvus(index: str = "sky", dimension: int = 2) -> Milvus:
    collection = {"name": "spectra", "tenant": "astro", "dimension": dimension, "index": index}
    return Milvus.model_validate({"image": IMAGE, "indexes": INDEXES, "collections": [collection]})


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """The server with the settings of the service, its paths apart; empty."""
    folder = tmp_path_factory.mktemp("milvus")
    settings = json.dumps(service.settings(milvus(), "storage-secret")).replace(service.DATA, str(folder / "data"))
    with network() as loopback, serving(recipe.NOW, folder, loopback, json.loads(settings)):
        yield Lab(loopback, folder / "gpulab/milvus.root.json")


ROOT, ASTRO, XRAY = "root-password-1", "astro-password-1", "x-ray-password-1"
PASSWORDS = {"root": ROOT, "astro": ASTRO, "x_ray": XRAY}


def test_an_empty_server_gets_all_and_keeps_it(lab: Lab) -> None:
    before = lab.read(milvus(), ["astro", "x_ray"])
    assert before["error"] and not before["users"]

    done = lab.apply(milvus(), PASSWORDS)

    assert done.returncode == 0, done.stderr
    assert lab.differences(milvus(), PASSWORDS) == []
    assert lab.read(milvus(), ["astro"])["version"].startswith("v2.3.5")
    assert lab.logins.stat().st_mode & 0o777 == 0o600
    left = json.loads(lab.logins.read_text())
    assert (left["uri"], left["user"], left["password"]) == (URI, "root", ROOT)
    assert "Fail connecting" in lab.tenant("A.list_collections()", "root", "Milvus", "default")
    assert not [text for text in lab.seen for password in PASSWORDS.values() if password in text]

    again = lab.apply(milvus(), PASSWORDS)
    assert (again.returncode, again.stdout) == (0, "")


def test_a_tenant_has_all_rights_at_home_and_none_elsewhere(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0

    assert lab.tenant(FILL, "astro", ASTRO) == "10"
    assert lab.tenant(SEARCH, "astro", ASTRO) == "7"
    own = (
        "index = A.prepare_index_params()\n"
        "index.add_index('vector', index_type='HNSW', metric_type='L2', params={'M': 4, 'efConstruction': 16})\n"
        "A.create_collection('own', schema=A.create_schema().add_field('id', 5, is_primary=True)"
        ".add_field('vector', 101, dim=2), index_params=index)\n"
        "A.create_alias('own', 'mine'); A.drop_alias('mine'); A.rename_collection('own', 'owned')\n"
        "A.drop_collection('owned'); print(A.list_collections())"
    )
    assert lab.tenant(own, "astro", ASTRO) == "['spectra']"
    for body in (
        FILL,
        SEARCH,
        "A.drop_collection('spectra')",
        "A.query('spectra', filter='id > 0')",
    ):
        assert "permission deny to x_ray" in lab.tenant(body, "x_ray", XRAY, "astro")
    for body in ("A.list_users()", "A.create_user('other', 'password-9')", "A.drop_database('astro')"):
        assert "permission deny to astro" in lab.tenant(body, "astro", ASTRO)
    assert lab.tenant(SEARCH, "astro", ASTRO) == "7"


def test_passwords_change_and_a_killed_run_is_continued(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    new = {"root": "root-password-2", "astro": "astro-password-2", "x_ray": XRAY}
    assert lab.differences(milvus(), new) == ["user root: new password", "user astro: new password"]

    assert lab.apply(milvus(), new).returncode == 0

    assert lab.differences(milvus(), new) == []
    assert "Fail connecting" in lab.tenant("A.list_collections()", "astro", ASTRO)

    # Killed between root's new password and the file that tells of it; and a password that its tenant changed.
    lab.tenant(f"A.update_password('astro', 'astro-password-2', '{ASTRO}')", "astro", "astro-password-2")
    assert lab.differences(milvus(), new) == ["user astro: new password"]
    lab.logins.unlink()
    assert lab.read(milvus(), ["astro"])["error"]
    assert lab.apply(milvus(), new).returncode == 0
    assert lab.differences(milvus(), new) == []

    lab.logins.unlink()
    done = lab.python(
        service._APPLY, json.dumps({**LOST, "deadline_s": 0}), stdin=json.dumps({"root": "lost-password"})
    )
    assert done.returncode == 1
    assert done.stderr.startswith("nobody can log in as root: ")
    assert lab.apply(milvus(), PASSWORDS | {"root": "root-password-2"}).returncode == 0
    assert lab.apply(milvus(), PASSWORDS).returncode == 0


LOST: dict[str, Any] = {"uri": URI, "databases": [], "digests": {}, "remove": [], "collections": []}


def test_another_index_is_built_and_the_rows_stay(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    assert lab.tenant(FILL.replace("insert", "upsert"), "astro", ASTRO) == "10"
    assert lab.differences(milvus("flat"), PASSWORDS) == [
        "collection astro.spectra: index made anew (metric_type L2 -> IP, M 8 -> 4, efConstruction 32 -> 16); "
        "the rows stay"
    ]

    assert lab.apply(milvus("flat"), PASSWORDS).returncode == 0

    assert lab.differences(milvus("flat"), PASSWORDS) == []
    # By the inner product the longest vector is the nearest.
    assert lab.tenant(SEARCH, "astro", ASTRO) == "9"
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    assert lab.tenant(SEARCH, "astro", ASTRO) == "7"

    refused = lab.apply(milvus("gpu"), PASSWORDS)

    assert refused.returncode == 1
    assert refused.stderr.strip() == (
        "collection astro.spectra: invalid index type: GPU_CAGRA; the image's Milvus is built for the CPU"
    )
    # The index before is back.
    assert lab.differences(milvus(), PASSWORDS) == []
    assert lab.tenant(SEARCH, "astro", ASTRO) == "7"


def test_another_dimension_is_refused_and_what_was_released_is_loaded(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    with pytest.raises(
        GpulabError, match=r"gpu01: milvus: collection astro.spectra: its vectors have 2 dimensions, de"
    ):
        lab.differences(milvus(dimension=3), PASSWORDS)
    refused = lab.apply(milvus(dimension=3), PASSWORDS)
    assert refused.returncode == 1
    assert "its vectors have 2 dimensions, declared are 3; it was left alone" in refused.stderr
    assert lab.differences(milvus(), PASSWORDS) == []

    assert lab.tenant("A.release_collection('spectra')", "astro", ASTRO) == ""
    assert lab.differences(milvus(), PASSWORDS) == ["collection astro.spectra: not in memory -> loaded"]
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    assert lab.differences(milvus(), PASSWORDS) == []


def test_rights_that_were_taken_are_given_back(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    taken = "A.revoke_privilege('gpulab_astro', 'Global', 'CreateCollection', '*', db_name='astro')"
    assert lab.tenant(taken, "root", ROOT, "default") == ""
    assert lab.differences(milvus(), PASSWORDS) == ["role gpulab_astro: + Global.CreateCollection"]

    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    assert lab.differences(milvus(), PASSWORDS) == []


def test_rights_too_many_are_taken_away(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    given = (
        "A.grant_privilege('gpulab_x_ray', 'Collection', 'Query', 'spectra', db_name='astro')\n"
        "A.grant_privilege('gpulab_x_ray', 'Global', 'CreateOwnership', '*', db_name='x_ray')\n"
        "A.grant_role('x_ray', 'admin')"
    )
    assert lab.tenant(given, "root", ROOT, "default") == ""
    assert lab.differences(milvus(), PASSWORDS) == [
        "role gpulab_x_ray: - Collection.Query of spectra in database astro",
        "role gpulab_x_ray: - Global.CreateOwnership of * in database x_ray",
        "user x_ray: - role admin",
    ]

    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    assert lab.differences(milvus(), PASSWORDS) == []
    assert "permission deny to x_ray" in lab.tenant("A.query('spectra', filter='id > 0')", "x_ray", XRAY, "astro")


def test_users_that_nobody_declares_go_and_their_databases_stay(lab: Lab) -> None:
    assert lab.apply(milvus(), PASSWORDS).returncode == 0
    less = {"root": ROOT, "astro": ASTRO}
    assert lab.differences(milvus(), less) == []
    assert wanted.undeclared(lab.read(milvus(), ["astro"]), ["astro"]) == ["x_ray"]

    assert lab.apply(milvus(), less, remove=["x_ray"]).returncode == 0

    found = lab.read(milvus(), ["astro"])
    assert wanted.undeclared(found, ["astro"]) == []
    assert "x_ray" in found["databases"] and "x_ray" not in found["users"]
    assert "gpulab_x_ray" not in found["roles"]

# SPDX-License-Identifier: MIT
"""What verify sees of the real Milvus server: whole, with rights too many or too few, and open to everybody."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from inventory.services import Milvus
from operations.containers.milvus import service
from rehearsal.registry.milvus import recipe
from tests.rehearsal.milvus_server import NETWORK, network, serving
from tests.rehearsal.test_milvus_deploy import ASTRO, FILL, PASSWORDS, ROOT, Lab, milvus
from verify.containers import indexes, milvus_remote

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace")

DENIED, UNKNOWN = "PERMISSION_DENIED", "UNAUTHENTICATED"

#: Collections and rows of a tenant.
COUNT = (
    "print(A.list_collections(), A.query('spectra', filter='', output_fields=['count(*)'], "
    "consistency_level='Strong')[0]['count(*)'])"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A server with the settings of the service; ten rows of astro's, and another tenant."""
    folder = tmp_path_factory.mktemp("milvus")
    settings = json.dumps(service.settings(milvus(), "storage-secret")).replace(service.DATA, str(folder / "data"))
    with network() as loopback, serving(recipe.NOW, folder, loopback, json.loads(settings)):
        made = Lab(loopback, folder / "gpulab/milvus.root.json")
        done = made.apply(milvus(), PASSWORDS)
        assert done.returncode == 0, done.stderr
        assert made.tenant(FILL, "astro", ASTRO) == "10"
        yield made


def verified(
    loopback: list[str], declared: Milvus | None = None, passwords: Mapping[str, str | None] = PASSWORDS
) -> dict[str, Any]:
    """What verify's program prints, run as on a guest."""
    wanted = declared or milvus()
    arguments = {
        "port": 19530,
        "metrics_port": 9091,
        "databases": {name: indexes.to_be_searched(wanted, name) for name in ("astro", "x_ray")},
    }
    words = [*loopback, sys.executable, "-I", "-c", Path(milvus_remote.__file__).read_text(), json.dumps(arguments)]
    done = subprocess.run(
        words, input=json.dumps(dict(passwords)), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def statuses(attempts: Mapping[str, Mapping[str, str]]) -> set[str]:
    return {told["status"] for told in attempts.values()}


def test_a_server_as_declared(lab: Lab) -> None:
    found = verified(lab.loopback)

    assert (found["error"], found["health"], found["unguarded"]) == ("", "OK", [])
    assert found["version"].startswith("v2.3.5")
    assert found["root"]["status"] == "OK"
    assert statuses(found["strangers"]) == {UNKNOWN} and len(found["strangers"]) == 4
    for name in ("astro", "x_ray"):
        tenant = found["tenants"][name]
        assert (tenant["login"]["status"], tenant["roles"]) == ("OK", [f"gpulab_{name}"])
        assert not statuses(tenant["own"]) & {DENIED, UNKNOWN}
        assert statuses(tenant["managing"]) == {DENIED}
    assert set(found["foreign"]) == {"astro in x_ray", "x_ray in astro"}
    assert {status for each in found["foreign"].values() for status in statuses(each)} == {DENIED}
    assert "read spectra" in found["foreign"]["x_ray in astro"]
    spectra = found["collections"]["astro.spectra"]
    assert (spectra["dimension"], spectra["loaded"], spectra["rows"]) == (2, True, 10)
    # Milvus counts rows of a sealed segment; these ten were inserted just now.
    assert spectra["indexed"] in (0, 10)
    assert spectra["index"].items() >= indexes.built(milvus().indexes["sky"]).items()
    assert (spectra["search"]["status"], spectra["search"]["found"]) == ("OK", 10)
    assert not [password for password in PASSWORDS.values() if password in json.dumps(found)]


def test_looking_leaves_nothing_behind_even_where_all_is_allowed(lab: Lab) -> None:
    gives = "A.grant_role('x_ray', 'admin')"
    assert lab.tenant(gives, "root", ROOT, "default") == ""
    before = held(lab)

    found = verified(lab.loopback)

    assert DENIED not in statuses(found["foreign"]["x_ray in astro"]) | statuses(found["tenants"]["x_ray"]["managing"])
    assert held(lab) == before
    assert lab.tenant(COUNT, "astro", ASTRO) == "['spectra'] 10"
    assert lab.tenant(gives.replace("grant", "revoke"), "root", ROOT, "default") == ""


def held(lab: Lab) -> dict[str, Any]:
    found = lab.read(milvus(), ["astro", "x_ray"])
    assert found["error"] == ""
    return {**found, "databases": sorted(found["databases"]), "users": sorted(found["users"])}


def test_rights_too_few_and_too_many_are_seen(lab: Lab) -> None:
    takes = "A.revoke_privilege('gpulab_astro', 'Global', 'CreateCollection', '*', db_name='astro')"
    gives = "A.grant_privilege('gpulab_x_ray', 'Collection', 'Query', 'spectra', db_name='astro')"
    assert lab.tenant(takes, "root", ROOT, "default") == ""
    assert lab.tenant(gives, "root", ROOT, "default") == ""

    found = verified(lab.loopback)

    own = found["tenants"]["astro"]["own"]
    assert [what for what, told in own.items() if told["status"] == DENIED] == ["make collections"]
    abroad = found["foreign"]["x_ray in astro"]
    assert [what for what, told in abroad.items() if told["status"] != DENIED] == ["read spectra"]
    assert lab.tenant(gives.replace("grant", "revoke"), "root", ROOT, "default") == ""
    assert lab.apply(milvus(), PASSWORDS).returncode == 0


def test_passwords_that_do_not_fit_and_collections_that_are_absent_are_told(lab: Lab) -> None:
    declared = milvus(dimension=3)
    declared.collections.append(declared.collections[0].model_copy(update={"name": "gone"}))

    found = verified(lab.loopback, declared, {"root": "another-password", "astro": ASTRO, "x_ray": None})

    assert found["root"]["status"] == UNKNOWN
    assert found["tenants"]["astro"]["roles"] is None
    assert found["tenants"]["x_ray"]["login"]["said"] == "the lab has no such password"
    assert found["collections"]["astro.gone"]["told"]["status"] == "REFUSED"
    assert found["collections"]["astro.spectra"]["dimension"] == 2
    assert found["error"] == ""


def test_released_collection_and_dropped_index_are_told(lab: Lab) -> None:
    assert lab.tenant("A.release_collection('spectra')", "astro", ASTRO) == ""
    released = verified(lab.loopback)["collections"]["astro.spectra"]
    assert lab.tenant("A.drop_index('spectra', 'vector')", "astro", ASTRO) == ""
    dropped = verified(lab.loopback)["collections"]["astro.spectra"]
    assert lab.apply(milvus(), PASSWORDS).returncode == 0

    assert (released["loaded"], released["search"], released["index"] is not None) == (False, None, True)
    assert dropped["index"] is None
    assert verified(lab.loopback)["collections"]["astro.spectra"]["search"]["found"] == 10


def test_a_server_with_upstreams_settings_is_open(tmp_path: Path) -> None:
    """Milvus' own defaults: nobody is asked for a login, and its other API answers beside the metrics."""
    settings = service.settings(milvus(), "storage-secret")
    settings["common"]["security"] = {"authorizationEnabled": False}
    settings["proxy"] = {"http": {"enabled": True}}
    own = json.loads(json.dumps(settings).replace(service.DATA, str(tmp_path / "data")))
    with network(f"{NETWORK}-open") as loopback, serving(recipe.NOW, tmp_path, loopback, own):
        found = verified(loopback)

    assert statuses(found["strangers"]) == {"OK"}
    assert found["unguarded"] == ["/api/v1/credential/users", "/api/v1/collections"]

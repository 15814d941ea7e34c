# SPDX-License-Identifier: MIT
"""What Milvus should hold, and how that differs from what it says it holds."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from inventory import GpulabError
from inventory.services import Milvus
from operations.containers.milvus import Passwords, milvus_spec, wanted

SERVICE = Milvus.model_validate(
    {
        "image": "milvusdb/milvus@sha256:" + 64 * "a",
        "indexes": {"sky": {"type": "HNSW"}, "gpu": {"type": "GPU_CAGRA", "adapt_for_cpu": True, "ef": 128}},
        "collections": [{"name": "spectra", "tenant": "astro-x", "dimension": 8, "index": "sky"}],
    }
)
PASSWORDS = Passwords({"root": "of-root", "astro_x": "of-astro"}, "of-storage", "key")
USERS = ["astro_x"]
INDEX = {"M": "16", "efConstruction": "200", "metric_type": "L2", "index_type": "HNSW", "index_name": "vector"}
#: As the real server 2.3.5 tells it.
RIGHT: dict[str, Any] = {
    "digests": PASSWORDS.digests,
    "logins": {"root": True, "astro_x": True},
    "databases": ["default", "astro_x"],
    "users": ["root", "astro_x"],
    "roles": {"gpulab_astro_x": {"users": ["astro_x"], "missing": [], "excess": []}},
    "collections": {"astro_x": {"spectra": {"dimension": 8, "index": INDEX, "loaded": True, "rows": 3}}},
}


def differences(**keys: Any) -> list[str]:
    found = {**copy.deepcopy(RIGHT), **keys}
    return wanted.differences(found, USERS, PASSWORDS.digests, wanted.collections(SERVICE), "gpu01")


def spectra(**keys: Any) -> dict[str, Any]:
    return {"astro_x": {"spectra": {**RIGHT["collections"]["astro_x"]["spectra"], **keys}}}


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({}, []),
        ({"databases": ["default"]}, ["database astro_x: absent -> empty"]),
        ({"users": ["root"], "logins": {"root": True}}, ["user astro_x: absent -> its own database"]),
        ({"logins": {"root": True, "astro_x": False}}, ["user astro_x: new password"]),
        ({"digests": {**PASSWORDS.digests, "root": "other"}}, ["user root: new password"]),
        ({"roles": {}}, ["role gpulab_astro_x: absent -> all rights in database astro_x"]),
        (
            {"roles": {"gpulab_astro_x": {"users": [], "missing": ["Collection.*"], "excess": []}}},
            ["role gpulab_astro_x: + Collection.*", "role gpulab_astro_x: + user astro_x"],
        ),
        ({"collections": {"astro_x": {}}}, ["collection astro_x.spectra: absent -> 8 dimensions, HNSW"]),
        (
            {"collections": spectra(index={**INDEX, "M": "8"})},
            ["collection astro_x.spectra: index made anew (M 8 -> 16); the rows stay"],
        ),
        (
            {"collections": spectra(index=None)},
            ["collection astro_x.spectra: index made anew (absent -> HNSW); the rows stay"],
        ),
        ({"collections": spectra(loaded=False)}, ["collection astro_x.spectra: not in memory -> loaded"]),
    ],
)
def test_each_difference_is_a_line(keys: dict[str, Any], lines: list[str]) -> None:
    assert differences(**keys) == lines


def test_another_dimension_is_refused() -> None:
    with pytest.raises(GpulabError, match="dimensions") as caught:
        differences(collections=spectra(dimension=4))
    assert "holds 3 rows" in str(caught.value)


def test_users_that_nobody_declares_are_those_with_a_role_of_ours() -> None:
    roles = {
        "gpulab_old": {"users": ["old"], "missing": [], "excess": []},
        "admin": {"users": ["root", "somebody"], "missing": [], "excess": []},
    }

    assert wanted.undeclared({"roles": roles}, USERS) == ["old"]


def test_secrets_stand_in_no_word_that_the_engine_is_told() -> None:
    spec = milvus_spec(SERVICE, "/srv/data", PASSWORDS)

    told = json.dumps(spec.create())
    assert not any(secret in told for secret in ("of-root", "of-astro", "of-storage"))
    assert "of-storage" in spec.secrets["/milvus/configs/user.yaml"]
    assert '"maxMemSize": 2560' in spec.secrets["/milvus/configs/user.yaml"]


def test_profiles_say_how_to_search() -> None:
    assert wanted.profiles(SERVICE)["gpu"]["search"] == {"ef": 128}
    assert wanted.profiles(SERVICE)["gpu"]["params"]["adapt_for_cpu"] == "true"

# SPDX-License-Identifier: MIT
"""A container's declaration: what it becomes for `docker create`, when it counts as changed, what it may not do."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError
from operations.containers import quadlet
from operations.containers.container import decide
from operations.containers.quadlet import mount_unit
from operations.containers.spec import ContainerSpec, Health, difference, familiar

IMAGE = "registry.example/a@sha256:" + 64 * "a"
SPEC = ContainerSpec(
    "web",
    IMAGE,
    environment={"A": "1"},
    ports={8080: 80},
    volumes={"/srv/data/web": "/data"},
    user="850:850",
    secrets={"/run/secrets/root": "hidden-one"},
    secrets_key="the lab's own key",
)

#: Another value for each field that `docker create` is told of.
OTHER: dict[str, Any] = {
    "image": IMAGE.replace("a" * 64, "b" * 64),
    "command": ("serve",),
    "environment": {"A": "2"},
    "volumes": {"/srv/data/web": "/elsewhere"},
    "ports": {8081: 80},
    "devices": ("nvidia.com/gpu=all",),
    "user": "1000:1000",
    "binds": {"/run/nvidia-mps": "/run/nvidia-mps"},
    "ipc": "host",
    "read_only": False,
    "tmpfs": ("/tmp", "/run"),
    "capabilities": ("CHOWN",),
    "memory_mib": 512,
    "cpus": 1.5,
    "pids": 100,
    "shm_mib": 256,
    "ulimits": {"nofile": 65536},
    "secrets": {"/run/secrets/root": "other"},
    "secrets_key": "another key",
    "entrypoint": "/bin/web",
    "health": Health(("curl", "-f", "http://127.0.0.1/")),
    "restart": "no",
    "network": "none",
    "after": ("etcd",),
    "stop_s": 60,
    "labels": {"a": "b"},
}
#: Asked from outside: a change of these takes no container down. Another engine has other containers.
OUTSIDE = {"name", "mounts", "probe", "ready_s", "engine"}


def test_every_field_is_known_to_count_or_not() -> None:
    assert {field.name for field in fields(ContainerSpec)} == {*OTHER, *OUTSIDE}


@pytest.mark.parametrize("name", OTHER)
def test_a_changed_declaration_has_another_digest_and_shows_its_difference(name: str) -> None:
    changed = replace(SPEC, **{name: OTHER[name]})
    assert changed.digest() != SPEC.digest()
    assert quadlet.digest(changed) != quadlet.digest(SPEC)
    lines = difference(json.dumps(SPEC.declaration()), changed)
    assert lines
    assert lines != difference(json.dumps(SPEC.declaration()), SPEC)


@pytest.mark.parametrize(("name", "value"), [("probe", "http://127.0.0.1/"), ("ready_s", 5), ("mounts", ("/srv",))])
def test_what_is_asked_from_outside_recreates_nothing(name: str, value: Any) -> None:
    assert replace(SPEC, **{name: value}).digest() == SPEC.digest()
    # Podman's unit waits for its disks.
    assert (quadlet.digest(replace(SPEC, **{name: value})) == quadlet.digest(SPEC)) == (name != "mounts")


@given(st.permutations(["A", "B", "C", "D"]))
def test_the_order_of_settings_does_not_matter(names: list[str]) -> None:
    ordered = replace(SPEC, environment=dict.fromkeys(sorted(names), "1"))
    assert replace(SPEC, environment=dict.fromkeys(names, "1")).digest() == ordered.digest()


def test_the_difference_names_what_goes_and_what_comes() -> None:
    before = json.dumps(SPEC.declaration())
    assert difference(before, replace(SPEC, environment={"B": "2"})) == (
        "environment.A: 1 -> absent",
        "environment.B: absent -> 2",
    )


def test_a_secret_is_a_file_of_the_user_and_shown_nowhere() -> None:
    [secret] = SPEC.secret_files()
    assert secret.source.startswith("/etc/gpulab/secrets/web/run-secrets-root.")
    assert (secret.content, secret.uid, secret.gid) == ("hidden-one", 850, 850)
    assert f"--mount=type=bind,source={secret.source},target=/run/secrets/root,readonly" in SPEC.create()
    shown = json.dumps([SPEC.create(), SPEC.declaration(), repr(SPEC), repr(secret)])
    unkeyed = hashlib.sha256(b"hidden-one").hexdigest()
    assert not [text for text in ("hidden-one", unkeyed, unkeyed[:12], "the lab's own key") if text in shown]


@given(content=st.text().map("hidden-{}".format), key=st.text(min_size=1))
def test_a_secret_counts_by_a_digest_that_needs_the_key(content: str, key: str) -> None:
    spec = replace(SPEC, secrets={"/run/secrets/root": content}, secrets_key=key)
    assert content not in " ".join(spec.create())
    assert (spec.digest() == SPEC.digest()) == ((content, key) == ("hidden-one", "the lab's own key"))


def test_a_secret_needs_a_key_and_somebody_to_read_it() -> None:
    for other in ({"secrets_key": ""}, {"user": ""}, {"user": "web"}):
        with pytest.raises(ValueError, match="web: secrets need secrets_key, and a user in numbers"):
            replace(SPEC, **other)


def test_a_change_of_our_own_options_is_named() -> None:
    assert difference(json.dumps(SPEC.declaration()), SPEC) == ("options of gpulab's own",)


def test_a_container_may_do_nothing_that_it_was_not_given() -> None:
    words = SPEC.create()
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges", "--read-only"} <= set(words)
    assert [word for word in words if word.startswith("--publish")] == ["--publish=127.0.0.1:8080:80"]
    assert "--mount=type=bind,source=/srv/data/web,target=/data" in words
    assert words[-1] == IMAGE


def test_images_are_named_as_docker_lists_them() -> None:
    assert familiar("docker.io/library/nginx@sha256:1") == "nginx@sha256:1"
    assert familiar("ollama/ollama@sha256:1") == "ollama/ollama@sha256:1"


def test_a_guest_that_does_not_exist_yet_gets_image_and_container() -> None:
    actions = decide({}, SPEC)
    assert (actions.pull, actions.replace) == (True, "it is absent")


def test_an_engine_that_is_down_is_no_reason_to_create_anything() -> None:
    with pytest.raises(GpulabError, match="does not answer"):
        decide({"info": None, "error": "gone"}, SPEC)


@pytest.mark.parametrize("user", ["", "1000", "ollama", "ollama:ollama"])
def test_folders_of_a_user_that_only_the_image_knows_stay_as_they_are(user: str) -> None:
    assert replace(SPEC, user=user, secrets={}).owned() == {}


def test_container_without_a_folder_on_its_disk_is_bound_to_one() -> None:
    """The engine would start it without the disk otherwise: it obeys its restart policy at each boot."""
    bound = replace(SPEC, volumes={"/etc/web": "/etc/web"}, mounts=("/srv/data",))
    mark = "--mount=type=bind,source=/srv/data/.gpulab,target=/run/gpulab/srv/data,readonly"

    assert mark in bound.create()
    assert "/srv/data/.gpulab" in bound.folders()
    assert mark not in replace(SPEC, mounts=("/srv/data",)).create()
    assert mark in replace(SPEC, volumes={"/srv/data2": "/data"}, mounts=("/srv/data",)).create()


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/srv/data", "srv-data.mount"),
        ("/srv/data/", "srv-data.mount"),
        ("/srv/my-data", "srv-my\\x2ddata.mount"),
        ("/.data/a.b", "\\x2edata-a.b.mount"),
        ("/", "-.mount"),
    ],
)
def test_unit_of_a_mount_point(path: str, unit: str) -> None:
    """As systemd-escape has it."""
    assert mount_unit(path) == unit

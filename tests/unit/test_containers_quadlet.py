# SPDX-License-Identifier: MIT
"""Podman: the same declaration as files of Quadlet, and the program that puts them in the place of those before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import operations
from inventory import GpulabError
from operations.containers import quadlet
from operations.containers.container import decide
from operations.containers.remote import quadlet as quadlet_remote
from operations.containers.spec import ContainerSpec, Health
from operations.remote import program

IMAGE = "registry.example/a@sha256:" + 64 * "a"
SPEC = ContainerSpec(
    "web",
    IMAGE,
    environment={"A": "1"},
    ports={8080: 80},
    volumes={"/srv/data/web": "/data"},
    mounts=("/srv/data",),
    user="850:850",
    secrets={"/run/secrets/root": "hidden-one"},
    secrets_key="the lab's own key",
    after=("store",),
    engine="podman",
)


def lines(spec: ContainerSpec) -> list[str]:
    return quadlet.files(spec)[f"{spec.name}.container"].splitlines()


def test_a_unit_may_do_nothing_that_it_was_not_given() -> None:
    found = lines(SPEC)
    assert {"DropCapability=all", "NoNewPrivileges=true", "ReadOnly=true", "Pull=never"} <= set(found)
    assert [line for line in found if line.startswith("PublishPort")] == ["PublishPort=127.0.0.1:8080:80"]
    assert {"User=850", "Group=850", "Network=gpulab-web.network"} <= set(found)


def test_a_unit_waits_for_its_disk_and_for_what_it_needs() -> None:
    assert {
        "RequiresMountsFor=/srv/data",
        "BindsTo=srv-data.mount",
        "Requires=store.service",
        "After=store.service",
        "WantedBy=multi-user.target srv-data.mount",
    } <= set(lines(SPEC))


def test_limits_that_quadlet_has_no_key_for_are_podmans_own_words() -> None:
    spec = replace(SPEC, memory_mib=512, cpus=1.5, ipc="host", shm_mib=64, pids=9, ulimits={"nofile": 5})
    found = lines(spec)
    assert "PodmanArgs=--ipc=host --memory=512m --cpus=1.5" in found
    assert {"PidsLimit=9", "Ulimit=nofile=5:5"} <= set(found)
    assert not [line for line in found if line.startswith("ShmSize")]
    assert "ShmSize=64m" in lines(replace(spec, ipc=""))


def test_no_secret_stands_in_a_file() -> None:
    shown = json.dumps(quadlet.files(SPEC))
    assert "hidden-one" not in shown
    assert f"source={SPEC.secret_files()[0].source},target=/run/secrets/root,ro=true" in shown


def test_a_service_without_network_of_its_own_has_one_file() -> None:
    assert list(quadlet.files(SPEC)) == ["web.container", "gpulab-web.network"]
    assert list(quadlet.files(replace(SPEC, network="none"))) == ["web.container"]
    assert "Network=none" in lines(replace(SPEC, network="none"))


@given(st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs"))))
def test_every_word_is_one_line_and_nothing_of_it_is_expanded(text: str) -> None:
    [line] = [line for line in lines(replace(SPEC, command=(text,))) if line.startswith("Exec=")]
    inner = line.removeprefix('Exec="').removesuffix('"')
    plain = inner.replace("$$", "$").replace("%%", "%").replace('\\"', '"').replace("\\\\", "\\")
    assert plain == text or "\\" in text
    assert "$" not in inner.replace("$$", "") and "%" not in inner.replace("%%", "")


def test_images_have_their_registry() -> None:
    assert quadlet.qualified("ollama/ollama@sha256:1") == "docker.io/ollama/ollama@sha256:1"
    assert quadlet.qualified("nginx@sha256:1") == "docker.io/library/nginx@sha256:1"
    assert quadlet.qualified("10.0.0.1:5000/a/b@sha256:1") == "10.0.0.1:5000/a/b@sha256:1"
    assert quadlet.qualified("localhost/a@sha256:1") == "localhost/a@sha256:1"


def facts(**container: Any) -> dict[str, Any]:
    whole = {
        "spec": quadlet.digest(SPEC),
        "declaration": "{}",
        "status": "running",
        "health": "",
        "exit_code": 0,
        "error": "",
        "gpu": None,
        **container,
    }
    podman = {"version": "5.4.2", "error": "", "images": [IMAGE], "containers": {"web": whole}}
    return {"info": None, "error": "no socket", "foreign": {}, "answers": {}, "podman": podman}


@pytest.mark.parametrize(
    ("container", "replaced", "started"),
    [
        ({}, "", ""),
        ({"spec": SPEC.digest()}, "its declaration changed", ""),
        ({"gpu": {"status": 9, "output": "No devices"}}, "it lost the GPU", ""),
        ({"status": "exited", "exit_code": 3}, "", "it is exited (exit status 3)"),
        ({"health": "unhealthy"}, "its health check fails", ""),
    ],
)
def test_a_service_of_podmans_is_told_as_one_of_dockers(container: Any, replaced: str, started: str) -> None:
    actions = decide(facts(**container), SPEC)
    assert (actions.pull, actions.replace, actions.start) == (False, replaced, started)


def test_podman_that_does_not_answer_is_no_reason_to_create_anything() -> None:
    with pytest.raises(GpulabError, match="web: the container engine does not answer"):
        decide({**facts(), "podman": None}, SPEC)


# Just enough of systemctl and podman: a unit runs what its file said when it was started.
SYSTEMCTL = """#!{python}
import json, os, sys
folder, path = os.environ["FOLDER"], os.environ["FOLDER"] + "/state.json"
state = json.load(open(path))
words, unit = sys.argv[1:], sys.argv[-1]
file = folder + "/units/" + unit.removesuffix(".service") + ".container"
match words[0]:
    case "show":
        active = "active" if state["running"].get(unit) else "inactive"
        loaded = "loaded" if unit in state["loaded"] else "not-found"
        print("LoadState=" + loaded, "ActiveState=" + active, "SubState=x", "Result=exit-code", "NRestarts=0",
              "ExecMainStatus=3", "RequiredBy=" + " ".join(state.get("followers", [])), sep="\\n")
    case "daemon-reload":
        names = os.listdir(folder + "/units")
        state["loaded"] = [n.removesuffix(".container") + ".service" for n in names if n.endswith(".container")]
    case "stop":
        state["running"].pop(unit, None)
        for each in state.get("followers", []):
            state["running"].pop(each, None)
    case "start":
        for each in words[1:]:
            name = folder + "/units/" + each.removesuffix(".service") + ".container"
            text = open(name).read() if os.path.exists(name) else each
            if "broken" not in text:
                state["running"][each] = text
json.dump(state, open(path, "w"))
"""
PODMAN = """#!{python}
import json, os, sys
state = json.load(open(os.environ["FOLDER"] + "/state.json"))
match sys.argv[1:3]:
    case ["container", "inspect"]:
        text = state["running"].get(sys.argv[-1] + ".service", "")
        health = "unhealthy" if "sick" in text else ""
        print(json.dumps([{{"State": {{"Status": "running", "Health": {{"Status": health}}}}}}]))
    case ["logs", _]:
        print("some last words")
"""
GENERATOR = """#!/bin/sh
if grep -rq refused "$QUADLET_UNIT_DIRS"; then echo "converting web.container: unsupported key" >&2; exit 1; fi
"""


class Guest:
    def __init__(self, folder: Path) -> None:
        self.folder, self.units = folder, folder / "units"
        self.units.mkdir()
        tools = {"systemctl": SYSTEMCTL, "podman": PODMAN, "generator": GENERATOR}
        for name, text in tools.items():
            (folder / name).write_text(text.format(python=sys.executable) if name != "generator" else text)
            (folder / name).chmod(0o755)
        self.set()

    def set(self, **state: Any) -> None:
        (self.folder / "state.json").write_text(json.dumps({"running": {}, "loaded": [], **state}))

    def running(self) -> dict[str, str]:
        return dict(json.loads((self.folder / "state.json").read_text())["running"])

    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.units.iterdir()}

    def do(self, text: str = "new", do: str = "replace", **order: Any) -> subprocess.CompletedProcess[str]:
        script = program(str(Path(operations.__file__).parent / "containers" / "facts.py"), "service", "quadlet")
        script = script.replace("/etc/gpulab/secrets", f"{self.folder}/secrets")
        script = script.replace("/etc/containers/systemd", str(self.units))
        script = script.replace(
            "/usr/lib/systemd/system-generators/podman-system-generator", f"{self.folder}/generator"
        )
        whole = {
            "do": do,
            "name": "web",
            "mounts": [],
            "folders": [],
            "owned": {},
            "probe": "",
            "gpu": False,
            "stop_s": 1,
            "deadline_s": 1,
            **order,
        }
        source = f"{self.folder}/secrets/web/{text}"
        secret = {"source": source, "content": text, "uid": os.geteuid(), "gid": os.getegid()}
        given = {"secrets": [secret], "files": {"web.container": text, "gpulab-web.network": ""}}
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "FOLDER": str(self.folder)}
        argv = [sys.executable, "-c", script, json.dumps(whole)]
        return subprocess.run(
            argv, capture_output=True, text=True, env=environment, check=False, input=json.dumps(given)
        )

    def secrets(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "secrets").glob("web/*"))


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_a_first_service(guest: Guest) -> None:
    done = guest.do("first")
    assert done.returncode == 0, done.stderr
    assert guest.running() == {"web.service": "first"}
    assert guest.files() == {"web.container": "first", "gpulab-web.network": ""}
    assert guest.secrets() == ["first"]


def test_a_replacement_leaves_nothing_behind(guest: Guest) -> None:
    guest.do("old")
    assert guest.do("new").returncode == 0
    assert guest.running() == {"web.service": "new"}
    assert guest.files() == {"web.container": "new", "gpulab-web.network": ""}
    assert guest.secrets() == ["new"]


def test_what_the_generator_refuses_does_not_stop_the_old_one(guest: Guest) -> None:
    guest.do("old")
    done = guest.do("refused")
    assert done.returncode == 1
    assert "Podman makes no unit of it:\nconverting web.container: unsupported key" in done.stderr
    assert (guest.running(), guest.files()["web.container"]) == ({"web.service": "old"}, "old")
    assert guest.secrets() == ["old"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("broken", "web ended with status 3 (exit-code)"),
        ("sick", "web is not ready after 1 s: its health check says unhealthy"),
    ],
)
def test_the_old_file_and_its_secret_come_back(guest: Guest, text: str, why: str) -> None:
    guest.do("old")
    done = guest.do(text)
    assert done.returncode == 1
    assert done.stderr.startswith(why)
    assert done.stderr.endswith("some last words\nThe previous container runs again.\n")
    assert guest.running() == {"web.service": "old"}
    assert guest.files() == {"web.container": "old", "gpulab-web.network": ""}
    assert guest.secrets() == ["old"]


def test_the_file_that_a_killed_run_left_is_what_comes_back(guest: Guest) -> None:
    guest.do("old")
    (guest.units / "web.container").rename(guest.units / "web.container.previous")
    (guest.units / "web.container").write_text("half tried")
    assert guest.do("broken").returncode == 1
    assert guest.files()["web.container"] == "old"
    assert guest.do("new").returncode == 0
    assert guest.files() == {"web.container": "new", "gpulab-web.network": ""}


def test_those_that_need_it_start_again_behind_it(guest: Guest) -> None:
    guest.set(running={"web.service": "old", "shop.service": "x"}, loaded=["web.service"], followers=["shop.service"])
    assert guest.do("new").returncode == 0
    assert set(guest.running()) == {"web.service", "shop.service"}


@pytest.mark.parametrize(
    ("sub_state", "status", "told"),
    [("auto-restart", "3", "probe ended with status 3 (exit-code)"), ("start", "0", None)],
)
def test_one_that_ends_again_and_again_is_told_with_the_status_that_it_ends_with(
    monkeypatch: pytest.MonkeyPatch, sub_state: str, status: str, told: str | None
) -> None:
    """While it starts once more systemd shows 0."""
    found = {"ActiveState": "activating", "SubState": sub_state, "Result": "exit-code", "NRestarts": "3"}
    monkeypatch.setattr(quadlet_remote, "state", lambda unit: {**found, "ExecMainStatus": status})
    if told is None:
        assert quadlet_remote.unready("probe") == "it was started again 3 times"
        return
    with pytest.raises(quadlet_remote.Failed, match=re.escape(told)):
        quadlet_remote.unready("probe")


def test_a_service_goes_with_its_network_and_its_secrets_only_when_asked_for(guest: Guest) -> None:
    guest.do("old")
    assert guest.do(do="remove", names=["web"], secrets_too=False).returncode == 0
    assert (guest.running(), guest.files(), guest.secrets()) == ({}, {}, ["old"])
    assert guest.do(do="remove", names=["web"], secrets_too=True).returncode == 0
    assert guest.secrets() == []


def test_a_network_of_another_service_stays(guest: Guest) -> None:
    guest.do("old")
    (guest.units / "shop.container").write_text("[Container]\nNetwork=gpulab-web.network\n")
    guest.do(do="remove", names=["web"], secrets_too=False)
    assert set(guest.files()) == {"shop.container", "gpulab-web.network"}


GENERATORS = Path("/usr/lib/systemd/system-generators/podman-system-generator")


@pytest.mark.skipif(not GENERATORS.exists(), reason="not run: no Podman with Quadlet on this machine")
def test_the_real_generator_makes_units_of_every_field(tmp_path: Path) -> None:
    spec = replace(SPEC, command=("a b", "$x%y"), health=Health(("true",)), cpus=0.5, shm_mib=5, pids=3)
    for name, text in quadlet.files(spec).items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [GENERATORS, "--dryrun"],
        env={"QUADLET_UNIT_DIRS": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "---web.service---" in done.stdout

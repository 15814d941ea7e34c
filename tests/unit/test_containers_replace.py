# SPDX-License-Identifier: MIT
"""The program that replaces a container, against a `docker` that remembers what it was told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import operations
from operations.remote import program

# Just enough of docker: containers with a name, a status and the words they were created with.
DOCKER = """#!{python}
import json, os, sys
path = os.environ["DOCKER_STATE"]
state = json.load(open(path))
words = sys.argv[1:]
names = [word for word in words if not word.startswith("-")]
def fail(text):
    print(text, file=sys.stderr)
    sys.exit(1)
def get(name):
    return state["containers"].get(name) or fail("No such container: " + name)
match words[0]:
    case "network":
        known = state.setdefault("networks", [])
        match words[1]:
            case "inspect":
                words[-1] in known or fail("network not found")
            case "create":
                state.get("pools") == 0 and fail("all predefined address pools have been fully subnetted")
                known.append(words[-1])
            case "ls":
                print(*known)
            case "rm":
                known.remove(words[-1])
    case "container" | "inspect":
        item = get(words[-1])
        health = "unhealthy" if item["image"] in state.get("unhealthy", []) else "healthy"
        found = {{"Status": item["status"], "ExitCode": 1, "Error": "", "Health": {{"Status": health}}}}
        networks = {{"Networks": {{name: {{}} for name in state.get("connected", [])}}}}
        print(json.dumps({{"RestartCount": 0, "State": found, "NetworkSettings": networks}}))
    case "create":
        if state.get("refuse"):
            fail("invalid mount config")
        state["containers"][words[words.index("--name") + 1]] = {{"status": "created", "image": words[-1]}}
    case "stop":
        get(words[-1])["status"] = "exited"
    case "start":
        item = get(words[-1])
        item["image"] in state.get("unstartable", []) and fail("network gpulab-web not found")
        item["status"] = "exited" if item["image"] in state.get("broken", []) else "running"
    case "rename":
        if words[2] in state["containers"]:
            fail("name in use")
        state["containers"][words[2]] = state["containers"].pop(words[1])
    case "rm":
        get(words[-1])
        del state["containers"][words[-1]]
    case "logs":
        print("some last words")
json.dump(state, open(path, "w"))
"""


class Guest:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.json"
        self.secrets = folder / "secrets"
        docker = folder / "docker"
        docker.write_text(DOCKER.format(python=sys.executable))
        docker.chmod(0o755)
        self.set()

    def set(self, containers: dict[str, str] | None = None, **state: Any) -> None:
        """Containers as name to image, all running but those in the middle of a replacement."""
        found = {
            name: {"status": "exited" if "." in name else "running", "image": image}
            for name, image in (containers or {}).items()
        }
        self.state.write_text(json.dumps({"containers": found, **state}))

    def containers(self) -> dict[str, tuple[str, str]]:
        found = json.loads(self.state.read_text())["containers"]
        return {name: (item["status"], item["image"]) for name, item in found.items()}

    def secret(self, name: str, content: str) -> dict[str, Any]:
        source = f"{self.secrets}/web/{name}"
        return {"source": source, "target": "/x", "content": content, "uid": os.geteuid(), "gid": os.getegid()}

    def replace(self, *secrets: dict[str, Any], **order: Any) -> subprocess.CompletedProcess[str]:
        text = program(str(Path(operations.__file__).parent / "containers" / "facts.py"), "service", "replace")
        # Not everybody who runs the tests may write to /run.
        text = text.replace("/run/gpulab/", f"{self.folder}/run/")
        whole = {
            "do": "replace",
            "name": "web",
            "create": ["new"],
            "network": "",
            "mounts": [],
            "folders": [],
            "owned": {},
            "probe": "",
            "gpu": False,
            "stop_s": 1,
            "deadline_s": 1,
            **order,
        }
        environment = {"PATH": f"{self.folder}:/usr/bin:/bin", "DOCKER_STATE": str(self.state)}
        text = text.replace("/etc/gpulab/secrets", str(self.secrets))
        argv = [sys.executable, "-c", text, json.dumps(whole)]
        given = json.dumps({"secrets": secrets})
        return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False, input=given)

    def kept(self) -> dict[str, str]:
        """The secrets' files of the service."""
        return {path.name: path.read_text() for path in self.secrets.glob("web/*")}

    def networks(self) -> list[str]:
        return list(json.loads(self.state.read_text()).get("networks", []))


def test_nobody_else_is_at_the_containers_meanwhile(guest: Guest) -> None:
    lock = guest.folder / "run/containers.lock"
    lock.parent.mkdir()
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(guest.replace)
            time.sleep(0.5)
            assert guest.containers() == {}
            fcntl.flock(file, fcntl.LOCK_UN)
            assert waiting.result().returncode == 0
    assert guest.containers() == {"web": ("running", "new")}


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    return Guest(tmp_path)


def test_a_first_container(guest: Guest) -> None:
    assert guest.replace().returncode == 0
    assert guest.containers() == {"web": ("running", "new")}


def test_a_replacement_leaves_nothing_behind(guest: Guest) -> None:
    guest.set({"web": "old"})
    assert guest.replace().returncode == 0
    assert guest.containers() == {"web": ("running", "new")}


def test_what_the_engine_refuses_does_not_stop_the_old_one(guest: Guest) -> None:
    guest.set({"web": "old"}, refuse=True)
    done = guest.replace()
    assert done.returncode == 1
    assert "invalid mount config" in done.stderr
    assert guest.containers() == {"web": ("running", "old")}


def test_a_new_one_that_ends_is_taken_back(guest: Guest) -> None:
    guest.set({"web": "old"}, broken=["new"])
    done = guest.replace()
    assert done.returncode == 1
    assert "some last words" in done.stderr
    assert done.stderr.endswith("The previous container runs again.\n")
    assert guest.containers() == {"web": ("running", "old")}


@pytest.mark.parametrize(
    "left", [{"web.previous": "old", "web.new": "newer"}, {"web": "old", "web.new": "newer"}, {"web.previous": "old"}]
)
def test_a_run_that_was_killed_is_made_good(guest: Guest, left: dict[str, str]) -> None:
    guest.set(left)
    assert guest.replace().returncode == 0
    assert guest.containers() == {"web": ("running", "new")}


def test_the_fallback_of_a_killed_run_is_used(guest: Guest) -> None:
    guest.set({"web.previous": "old"}, broken=["new"])
    assert guest.replace().returncode == 1
    assert guest.containers() == {"web": ("running", "old")}


def test_no_folder_is_made_where_the_data_disk_should_be(guest: Guest, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    done = guest.replace(mounts=[str(data)], folders=[f"{data}/web"])
    assert done.returncode == 1
    assert f"{data} is not mounted" in done.stderr
    assert not list(data.iterdir())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder of root's with a file and a link out of it."""
    if os.geteuid() != 0:
        pytest.skip("not run: only root can give files away")
    folder = tmp_path / "data"
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs/one").write_text("1")
    (tmp_path / "outside").write_text("")
    (folder / "link").symlink_to(tmp_path / "outside")
    return folder


def owners(folder: Path) -> dict[str, int]:
    return {path.name: path.lstat().st_uid for path in [folder, *folder.rglob("*"), folder.parent / "outside"]}


def test_a_tree_becomes_the_users_with_all_in_it_and_nothing_else(guest: Guest, tree: Path) -> None:
    guest.set({"web": "old"})
    assert guest.replace(owned={str(tree): [850, 850]}).returncode == 0
    assert owners(tree) == {"data": 850, "blobs": 850, "one": 850, "link": 850, "outside": 0}


def test_a_handover_that_was_killed_is_finished(guest: Guest, tree: Path) -> None:
    os.chown(tree / "blobs", 850, 850)
    assert guest.replace(owned={str(tree): [850, 850]}).returncode == 0
    assert set(owners(tree).values()) == {850, 0}
    assert owners(tree)["one"] == 850


def test_a_tree_goes_back_with_the_container_that_could_use_it(guest: Guest, tree: Path) -> None:
    guest.set({"web": "old"}, broken=["new"])
    assert guest.replace(owned={str(tree): [850, 850]}).returncode == 1
    assert guest.containers() == {"web": ("running", "old")}
    assert set(owners(tree).values()) == {0}


def test_a_check_that_fails_brings_the_old_one_back(guest: Guest) -> None:
    guest.set({"web": "old"})
    words = ["/bin/sh", "-c", "echo it counts 1 row, before 2 >&2; exit 1"]
    done = guest.replace(check={"words": words, "seconds": 5})
    assert done.returncode == 1
    assert done.stderr.startswith("web: it counts 1 row, before 2\n")
    assert done.stderr.endswith("The previous container runs again.\n")
    assert guest.containers() == {"web": ("running", "old")}


def test_a_check_that_passes_keeps_the_new_one_and_one_that_hangs_does_not(guest: Guest) -> None:
    guest.set({"web": "old"})
    assert guest.replace(check={"words": ["/bin/true"], "seconds": 5}).returncode == 0
    assert guest.containers() == {"web": ("running", "new")}
    done = guest.replace(check={"words": ["/bin/sleep", "30"], "seconds": 1})
    assert "web: /bin/sleep: no end after 1 s" in done.stderr
    assert guest.containers() == {"web": ("running", "new")}


def test_a_service_that_never_answers_is_named(guest: Guest) -> None:
    done = guest.replace(probe="http://127.0.0.1:9/")
    assert done.returncode == 1
    assert "web is not ready after 1 s: http://127.0.0.1:9/:" in done.stderr
    assert guest.containers() == {}


def test_a_network_is_made_once_and_outlives_its_first_container(guest: Guest) -> None:
    guest.set(broken=["new"])
    assert guest.replace(network="gpulab-web").returncode == 1
    assert (guest.containers(), guest.networks()) == ({}, ["gpulab-web"])

    guest.set({"web": "old"}, networks=["gpulab-web"])
    assert guest.replace(network="gpulab-web").returncode == 0
    assert guest.networks() == ["gpulab-web"]


def test_a_network_that_cannot_be_made_costs_nobody_anything(guest: Guest) -> None:
    guest.set({"web": "old"}, pools=0)
    done = guest.replace(guest.secret("a.1", "one"), network="gpulab-web")
    assert done.returncode == 1
    assert "docker network: all predefined address pools" in done.stderr
    assert guest.containers() == {"web": ("running", "old")}
    assert guest.kept() == {}


def test_a_secret_is_the_users_alone(guest: Guest) -> None:
    assert guest.replace(guest.secret("a.1", "one")).returncode == 0
    [path] = guest.secrets.glob("web/*")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("one", 0o400)
    assert [folder.stat().st_mode & 0o777 for folder in (guest.secrets, guest.secrets / "web")] == [0o700, 0o700]


def test_a_changed_secret_takes_the_place_of_the_one_before(guest: Guest) -> None:
    guest.replace(guest.secret("a.1", "one"))
    assert guest.replace(guest.secret("a.2", "two")).returncode == 0
    assert guest.kept() == {"a.2": "two"}


@pytest.mark.parametrize("failing", ["broken", "unhealthy"])
def test_the_old_secret_is_there_for_the_container_that_is_put_back(guest: Guest, failing: str) -> None:
    guest.replace(guest.secret("a.1", "one"))
    guest.set({"web": "old"}, **{failing: ["new"]})

    done = guest.replace(guest.secret("a.2", "two"))

    assert done.returncode == 1
    assert ("its health check says unhealthy" in done.stderr) == (failing == "unhealthy")
    assert guest.containers() == {"web": ("running", "old")}
    assert guest.kept() == {"a.1": "one"}
    assert "one" not in done.stderr.split() and "two" not in done.stderr.split()


def test_one_that_cannot_be_started_is_made_anew(guest: Guest) -> None:
    guest.set({"web": "old"}, unstartable=["old"], connected=["gpulab-web"])
    done = guest.replace(do="start", network="gpulab-web")
    assert done.returncode == 0, done.stderr
    assert "network gpulab-web not found; it is made anew" in done.stderr
    assert guest.containers() == {"web": ("running", "new")}


def test_one_that_was_taken_from_its_network_is_made_anew(guest: Guest) -> None:
    guest.set({"web": "old"}, connected=["bridge"])
    done = guest.replace(do="start", network="gpulab-web")
    assert done.returncode == 0, done.stderr
    assert "web is not connected to gpulab-web; it is made anew" in done.stderr
    assert guest.containers() == {"web": ("running", "new")}


def test_one_that_was_only_stopped_is_not_made_anew(guest: Guest) -> None:
    guest.set({"web": "old"}, connected=["gpulab-web"])
    assert guest.replace(do="start", network="gpulab-web").returncode == 0
    assert guest.containers() == {"web": ("running", "old")}


def test_a_service_goes_with_its_network_and_secrets(guest: Guest) -> None:
    guest.replace(guest.secret("a.1", "one"), network="gpulab-web")
    assert guest.replace(do="remove", names=["web"]).returncode == 0
    assert (guest.containers(), guest.networks(), guest.kept()) == ({}, [], {})

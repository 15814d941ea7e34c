# SPDX-License-Identifier: MIT
"""What gpulab-heal decides, and what it does on a guest whose tools remember what they were told."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import operations
from inventory.services import Services
from operations.containers.healing import watched
from operations.containers.remote import heal
from operations.remote import program

POLICY = {"interval_s": 60, "failures": 3, "window_s": 3600, "grace_s": 120}
NOW = 1_000_000.0


def service(**keys: Any) -> dict[str, Any]:
    """A service that is well."""
    return {
        "engine": "docker",
        "id": 64 * "1",
        "identity": 64 * "1",
        "running": True,
        "status": "running (exit status 0)",
        "error": "",
        "started": NOW - 1000,
        "unhealthy": False,
        "spared": "",
        "shows": "ps",
        "inside": "",
        "silent": "",
        "on_cpu": "",
        "use": "",
        "holds_mib": 0,
        **keys,
    }


ENDED = {"running": False, "status": "exited (exit status 128)", "started": NOW - 1000}


@pytest.mark.parametrize(
    ("seen", "memory", "do", "said"),
    [
        ({}, {}, "nothing", "well"),
        ({"use": "820 MiB of the card"}, {}, "nothing", "well: 820 MiB of the card"),
        (ENDED, {}, "restart", "it is exited"),
        ({**ENDED, "error": "unresolvable CDI devices"}, {}, "restart", "unresolvable CDI devices"),
        ({**ENDED, "spared": "stopped by hand"}, {}, "nothing", "stopped by hand"),
        ({"inside": "Failed to initialize NVML"}, {}, "restart", "lost the GPU: Failed to initialize NVML"),
        # One silent moment is no reason to end what others compute.
        ({"silent": "timed out"}, {}, "wait", "seen once"),
        ({"silent": "timed out"}, {"bad": 1}, "restart", "does not answer: timed out"),
        ({"unhealthy": True}, {"bad": 1}, "restart", "health check"),
        ({"on_cpu": "tiny:latest"}, {"bad": 1}, "restart", "computes on the CPU: tiny:latest"),
        ({"running": False, "status": "restarting (exit status 1)"}, {}, "wait", "seen once"),
        ({"running": False, "status": "restarting (exit status 1)"}, {"bad": 1}, "restart", "it is restarting"),
        ({"shows": "memory"}, {}, "nothing", "well"),
        ({"shows": "memory"}, {"held": NOW - 1000, "bad": 1}, "restart", "none of the card's memory"),
        ({"shows": "memory", "holds_mib": 900}, {"held": NOW - 1000, "bad": 1}, "nothing", "well"),
        # What the container before it held is no matter of its own.
        ({"shows": "memory"}, {"held": NOW - 2000, "bad": 1}, "nothing", "well"),
        ({"inside": "gone", "started": NOW - 119}, {}, "wait", "started 119 s ago, has 120 s"),
        ({"inside": "gone", "started": NOW - 120}, {}, "restart", "lost the GPU"),
        ({"inside": "gone"}, {"restarts": [NOW - 9, NOW - 8]}, "restart", "lost the GPU"),
        ({"inside": "gone"}, {"restarts": [NOW - 9, NOW - 8, NOW - 7]}, "alarm", "3 times within 60 min"),
        ({"inside": "gone"}, {"restarts": [NOW - 3601, NOW - 8, NOW - 7]}, "restart", "lost the GPU"),
    ],
)
def test_judgement(seen: dict[str, Any], memory: dict[str, Any], do: str, said: str) -> None:
    verdict = heal.judge(service(**seen), memory, NOW, POLICY)

    assert verdict.do == do
    assert said in verdict.words


@given(
    ages=st.lists(st.floats(min_value=0, max_value=7200), max_size=12),
    inside=st.sampled_from(["", "gone"]),
    spared=st.sampled_from(["", "stopped by hand"]),
    failures=st.integers(min_value=1, max_value=5),
)
def test_no_more_restarts_than_declared_and_none_of_what_is_spared(
    ages: list[float], inside: str, spared: str, failures: int
) -> None:
    memory = {"restarts": [NOW - age for age in ages]}

    verdict = heal.judge(service(inside=inside, spared=spared), memory, NOW, {**POLICY, "failures": failures})

    recent = sum(age < 3600 for age in ages)
    assert (verdict.do == "restart") == (bool(inside) and not spared and recent < failures)
    assert (verdict.do == "alarm") == (bool(inside) and not spared and recent >= failures)


BOOT = 1_600_000_000.0
LATER = "2026-11-29T04:00:00.123456789Z"


@pytest.mark.parametrize(
    ("state", "policy", "expected"),
    [
        ({"ExitCode": 0}, "unless-stopped", True),
        ({"ExitCode": 137}, "unless-stopped", True),
        # The engine tried, and could not.
        ({"ExitCode": 128, "Error": "unresolvable CDI devices"}, "unless-stopped", False),
        ({"ExitCode": 137, "OOMKilled": True}, "unless-stopped", False),
        ({"ExitCode": 0, "FinishedAt": "2019-01-01T00:00:00Z"}, "unless-stopped", False),
        ({"ExitCode": 0, "FinishedAt": "0001-01-01T00:00:00Z"}, "unless-stopped", False),
        ({"ExitCode": 0, "Status": "running"}, "unless-stopped", False),
        ({"ExitCode": 143}, "no", True),
        ({"ExitCode": 1}, "no", False),
    ],
)
def test_who_stopped_a_container(state: dict[str, Any], policy: str, expected: bool) -> None:
    whole = {"Status": "exited", "Error": "", "OOMKilled": False, "FinishedAt": LATER, **state}

    assert heal.by_hand(whole, policy, BOOT) is expected


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (LATER, 1795924800.123456),
        ("2026-11-29T05:00:00.1+01:00", 1795924800.1),
        ("2026-11-29 05:00:00.1 +0100 CET", 1795924800.1),
        ("0001-01-01T00:00:00Z", None),
        ("", None),
        (None, None),
    ],
)
def test_times_of_the_engines(stamp: str | None, expected: float | None) -> None:
    assert heal.seconds(stamp) == expected


def test_start_of_the_guest_lies_in_the_past() -> None:
    assert 0 < heal.booted() <= time.time()


def test_what_is_watched_of_each_service() -> None:
    image = "lab/x@sha256:" + 64 * "a"
    services = Services.model_validate({"ollama": {"image": image}, "milvus": {"image": image}})

    found = watched(services, gpu=True)

    assert found["ollama"]["ps"] == "http://127.0.0.1:11434/api/ps"
    assert found["milvus"] == {"probe": "http://127.0.0.1:9091/healthz", "shows": "memory"}
    assert {each["shows"] for each in watched(services, gpu=False).values()} == {""}
    assert watched(Services(), gpu=True) == {}


# On a guest.

TOOL = """#!{python}
import json, os, sys
path = {state!r}
state = json.load(open(path))
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
state["calls"].append(" ".join(words))
json.dump(state, open(path, "w"))
def end(text, status=0):
    print(text, file=sys.stderr if status else sys.stdout)
    sys.exit(status)
match words:
    case ["nvidia-smi", "-L"]:
        end("GPU 0: NVIDIA RTX A4000" if state["gpu"] else "No devices were found", 0 if state["gpu"] else 6)
    case ["nvidia-smi", *_]:
        end("")
    case ["docker", "inspect", *_]:
        item = state["containers"].get(words[-1])
        end(json.dumps([item]) if item else "Error: No such container", 0 if item else 1)
    case ["docker", "exec", *_]:
        end(state["inside"], 0 if "GPU " in state["inside"] else 255)
    case ["docker", "restart", *_]:
        end(state["refused"] or words[-1], 1 if state["refused"] else 0)
    case ["podman", "inspect", *_]:
        item = state["containers"].get(words[-1])
        end(json.dumps([item]) if item else "no such container", 0 if item else 125)
    case ["podman", "exec", *_]:
        end(state["inside"], 0 if "GPU " in state["inside"] else 255)
    case ["systemctl", "show", *_]:
        end("".join(f"{{key}}={{value}}\\n" for key, value in state["unit"].items()))
"""


class Answers(BaseHTTPRequestHandler):
    status = 200
    models: list[dict[str, Any]] = []

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(json.dumps({"models": self.models}).encode())

    def log_message(self, *_: Any) -> None:
        pass


class Guest:
    """gpulab-heal as it is installed, with its folders and tools below one of the test's."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.state = folder, folder / "state.json"
        for tool in ("docker", "podman", "nvidia-smi", "systemctl"):
            path = folder / "bin" / tool
            path.parent.mkdir(exist_ok=True)
            path.write_text(TOOL.format(python=sys.executable, state=str(self.state)))
            path.chmod(0o755)
        (folder / "cdi").mkdir()
        (folder / "cdi/nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
        where = f"http://127.0.0.1:{port}"
        ollama = {"probe": f"{where}/api/version", "shows": "ps", "ps": f"{where}/api/ps"}
        # The root folder is a mount point wherever the tests run.
        self.configuration = {**POLICY, "engine": "docker", "data": "/", "gpu": True, "services": {"ollama": ollama}}
        self.tell(gpu=True, inside="GPU 0: A4000", refused="", unit={}, containers={"ollama": container()}, calls=[])

    def tell(self, **keys: Any) -> None:
        found = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.state.write_text(json.dumps({**found, **keys}))

    def container(self, **keys: Any) -> None:
        self.tell(containers={"ollama": container(**keys)})

    def heal(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "heal.json").write_text(json.dumps(self.configuration))
        text = program(str(Path(operations.__file__).parent / "containers/healing.py"), "heal")
        for there, here in {
            "/etc/gpulab/heal.json": "heal.json",
            "/var/lib/gpulab/heal": "heal",
            "/run/gpulab/": "run/",
            "/etc/cdi": "cdi",
            "/var/run/cdi": "no-cdi",
            "/etc/containers/systemd": "quadlet",
        }.items():
            text = text.replace(there, f"{self.folder}/{here}")
        argv = [sys.executable, "-I", "-c", text, *words]
        search = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", **environment}
        return subprocess.run(argv, capture_output=True, text=True, env=search, check=False)

    def calls(self, word: str) -> int:
        return sum(word in call for call in json.loads(self.state.read_text())["calls"])

    def notes(self) -> list[dict[str, str]]:
        path = self.folder / "heal/notes.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def seen(self) -> str:
        look: str = json.loads((self.folder / "heal/look.json").read_text())["services"]["ollama"]
        return look


def container(**keys: Any) -> dict[str, Any]:
    state = {"Status": "running", "Running": True, "ExitCode": 0, "Error": "", "StartedAt": "2026-01-01T00:00:00Z"}
    return {
        "Id": keys.pop("id", 64 * "1"),
        "Config": {"Labels": {"org.gpulab.service": keys.pop("label", "ollama")}},
        "HostConfig": {"RestartPolicy": {"Name": "unless-stopped"}},
        "State": {**state, **keys},
    }


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Guest]:
    Answers.status, Answers.models = 200, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield Guest(tmp_path, server.server_port)
        server.shutdown()


def test_service_that_is_well_is_left_alone(guest: Guest) -> None:
    Answers.models = [{"name": "tiny:latest", "size_vram": 900 << 20}]

    assert guest.heal().returncode == 0
    assert guest.seen() == "well: 900 MiB of the card"
    assert (guest.calls("restart"), guest.notes()) == (0, [])


def test_lost_gpu_is_healed_with_a_note(guest: Guest) -> None:
    guest.tell(inside="Failed to initialize NVML: Unknown Error")

    done = guest.heal(JOURNAL_STREAM="1:2")

    assert done.returncode == 0
    assert guest.calls("docker restart ollama") == 1
    assert done.stdout.startswith("<4>ollama: its container has lost the GPU: Failed to initialize NVML")
    (note,) = guest.notes()
    assert note["service"] == "ollama" and note["done"] == "restarted (1 of 3 within 60 min)"
    assert note["seen"] in guest.heal("--status").stdout


def test_silent_service_is_restarted_at_the_second_look(guest: Guest) -> None:
    Answers.status = 503

    guest.heal()
    assert (guest.calls("restart"), "HTTP 503 (seen once" in guest.seen()) == (0, True)
    guest.heal()

    assert guest.calls("docker restart ollama") == 1


def test_good_look_forgets_the_bad_one(guest: Guest) -> None:
    for status in (503, 200, 503, 200, 503):
        Answers.status = status
        guest.heal()

    assert guest.calls("restart") == 0


def test_model_on_the_cpu_is_noticed(guest: Guest) -> None:
    Answers.models = [{"name": "tiny:latest", "size_vram": 0}]

    guest.heal()
    guest.heal()

    assert guest.calls("docker restart ollama") == 1
    assert "it computes on the CPU: tiny:latest" in guest.notes()[0]["seen"]


def test_three_failures_end_it_with_an_alarm(guest: Guest) -> None:
    guest.tell(inside="Failed to initialize NVML")
    done = [guest.heal(JOURNAL_STREAM="1:2") for _ in range(6)]

    assert [each.returncode for each in done] == [0, 0, 0, 1, 1, 1]
    assert guest.calls("docker restart ollama") == 3
    alerts = [line for each in done for line in each.stdout.splitlines() if line.startswith("<1>")]
    assert len(alerts) == 1 and alerts[0].startswith("<1>ALARM ollama: ")
    assert "restarted 3 times within 60 min" in (guest.folder / "heal/alarm/ollama").read_text()
    assert "ALARM ollama" in guest.heal("--status").stdout


def test_reset_takes_the_alarm_back(guest: Guest) -> None:
    guest.tell(inside="Failed to initialize NVML")
    for _ in range(4):
        guest.heal()
    guest.tell(inside="GPU 0: A4000")

    assert guest.heal("--reset", "milvus").returncode == 2
    assert guest.heal("--reset", "ollama").returncode == 0

    assert guest.calls("systemctl reset-failed gpulab-heal.service") == 1
    assert (guest.heal().returncode, guest.seen()) == (0, "well: no model in memory")


def test_new_container_begins_anew(guest: Guest) -> None:
    guest.tell(inside="Failed to initialize NVML")
    for _ in range(4):
        guest.heal()
    guest.container(id=64 * "2")
    guest.tell(inside="GPU 0: A4000")

    assert guest.heal().returncode == 0
    assert guest.notes()[-1]["seen"] == "its container is a new one"


def test_restart_that_fails_counts_and_is_told(guest: Guest) -> None:
    guest.container(Status="exited", Running=False, ExitCode=128, Error="unresolvable CDI devices nvidia.com/gpu=all")
    guest.tell(refused="Error response from daemon: unresolvable CDI devices nvidia.com/gpu=all")

    for _ in range(4):
        guest.heal()

    assert guest.calls("docker restart ollama") == 3
    assert "its devices are gone: deploy again" in guest.notes()[0]["done"]
    assert (guest.folder / "heal/alarm/ollama").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"Status": "exited", "Running": False, "FinishedAt": now}, "stopped by hand"),
        ({"Status": "exited", "Running": False, "ExitCode": 143, "FinishedAt": now}, "stopped by hand"),
        ({"Status": "paused"}, "paused by hand"),
        ({"Status": "created", "Running": False}, "a deploy is at it"),
        ({"label": "somebody"}, "is not gpulab's"),
        ({"StartedAt": now}, "s ago, has 120 s"),
    ],
)
def test_what_is_left_alone(guest: Guest, keys: dict[str, Any], said: str) -> None:
    guest.tell(inside="Failed to initialize NVML")
    # Tests may run minutes after they were collected.
    guest.container(**{key: value() if callable(value) else value for key, value in keys.items()})

    for _ in range(3):
        assert guest.heal().returncode == 0

    assert said in guest.seen()
    assert (guest.calls("restart"), guest.notes()) == (0, [])


def test_container_that_is_not_there_is_a_deploys_business(guest: Guest) -> None:
    guest.tell(containers={})

    assert guest.heal().returncode == 0
    assert guest.seen() == "there is no container ollama: a deploy makes it"


def test_nothing_is_touched_without_the_data_disk(guest: Guest) -> None:
    guest.configuration["data"] = str(guest.folder / "away")
    guest.tell(inside="Failed to initialize NVML")

    assert guest.heal().returncode == 0
    assert guest.seen() == f"nothing is mounted at {guest.folder}/away: left alone"
    assert guest.calls("docker") == 0


def test_nothing_is_touched_while_a_deploy_replaces_a_container(guest: Guest) -> None:
    guest.tell(inside="Failed to initialize NVML")
    (guest.folder / "run").mkdir()
    with (guest.folder / "run/containers.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert guest.heal().returncode == 0

    assert (guest.calls("docker"), guest.seen()) == (0, "left alone: a deploy is at work")


def no_driver(guest: Guest) -> None:
    guest.tell(gpu=False)


def no_specification(guest: Guest) -> None:
    (guest.folder / "cdi/nvidia.yaml").unlink()


@pytest.mark.parametrize(("lose", "said"), [(no_driver, "No devices were found"), (no_specification, "deploy again")])
def test_lost_gpu_of_the_guest_raises_an_alarm_and_restarts_nothing(
    guest: Guest, lose: Callable[[Guest], None], said: str
) -> None:
    guest.tell(inside="Failed to initialize NVML")
    lose(guest)

    done = [guest.heal().returncode for _ in range(3)]

    # A driver that is being loaded anew is away for one look.
    assert done == [0, 1, 1]
    assert guest.calls("restart") == 0
    assert said in (guest.folder / "heal/alarm/gpu").read_text()
    guest.tell(gpu=True, inside="GPU 0: A4000")
    (guest.folder / "cdi/nvidia.yaml").write_text("kind: nvidia.com/gpu\n")
    assert guest.heal().returncode == 0
    assert [note["done"] for note in guest.notes()][1:] == ["alarm taken back"]


def test_notes_are_bounded(guest: Guest) -> None:
    path = guest.folder / "heal/notes.jsonl"
    path.parent.mkdir()
    old = {"time": "then", "service": "ollama", "seen": "it is exited", "done": "restarted"}
    path.write_text(f"{json.dumps(old)}\n" * 2 * heal.NOTES)
    guest.tell(inside="Failed to initialize NVML")

    guest.heal()

    assert len(guest.notes()) == heal.NOTES
    assert "lost the GPU" in guest.notes()[-1]["seen"]


def test_broken_state_is_begun_anew(guest: Guest) -> None:
    (guest.folder / "heal").mkdir()
    (guest.folder / "heal/state.json").write_text('{"ollama": {"ba')
    (guest.folder / "heal/notes.jsonl").write_text('{"time": "th\n')

    assert guest.heal().returncode == 0
    assert guest.heal("--status").returncode == 0


def podman(guest: Guest, **unit: str) -> None:
    guest.configuration["engine"] = "podman"
    (guest.folder / "quadlet").mkdir(exist_ok=True)
    (guest.folder / "quadlet/ollama.container").write_text("[Container]\n")
    shown = {"LoadState": "loaded", "ActiveState": "active", "Result": "success", "ActiveEnterTimestampMonotonic": "9"}
    guest.tell(unit={**shown, **unit}, containers={"ollama": container(StartedAt="2026-01-01 00:00:00.5 +0100 CET")})


def test_podmans_unit_is_restarted(guest: Guest) -> None:
    podman(guest)
    assert guest.heal().returncode == 0
    assert guest.seen() == "well: no model in memory"
    guest.tell(inside="Failed to initialize NVML")

    guest.heal()

    assert guest.calls("systemctl restart ollama.service") == 1
    assert guest.calls("docker") == 0


@pytest.mark.parametrize(
    ("unit", "restarts", "said"),
    [
        ({"ActiveState": "failed", "Result": "exit-code"}, 1, "it is failed (exit-code)"),
        ({"ActiveState": "inactive"}, 0, "stopped by hand"),
        # It was never started since the boot.
        ({"ActiveState": "inactive", "ActiveEnterTimestampMonotonic": "0"}, 1, "it is inactive"),
        ({"ActiveState": "activating"}, 0, "its unit is activating"),
        ({"LoadState": "not-found"}, 0, "a deploy makes it"),
    ],
)
def test_podmans_unit_that_does_not_run(guest: Guest, unit: dict[str, str], restarts: int, said: str) -> None:
    podman(guest, **unit)

    guest.heal()

    assert said in guest.seen()
    assert guest.calls("systemctl restart") == restarts

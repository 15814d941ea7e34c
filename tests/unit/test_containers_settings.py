# SPDX-License-Identifier: MIT
"""daemon.json: ours is put in, everything else stays; a Docker that does not start with it gets the file before."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inventory import GpulabError
from operations import files
from operations.containers.settings import BOUNDS, SPECIFICATIONS, daemon_settings, parsed, same
from operations.remote import program

VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
#: Keys that something of ours depends on are drawn often, with values of the right and the wrong type.
OURS = st.sampled_from(["features", "live-restore", "log-driver", "log-opts", "cdi-spec-dirs", "runtimes"])
DRIVERS = st.sampled_from(["local", "json-file", "journald", "syslog", ""])
OBJECTS = st.dictionaries(OURS | st.text(), VALUES | DRIVERS | st.dictionaries(st.text(), st.text()), max_size=5)


@given(OBJECTS)
def test_ours_is_set_everything_else_stays_and_it_settles_at_once(current: dict[str, Any]) -> None:
    once = daemon_settings(json.dumps(current))
    merged = json.loads(once)

    assert daemon_settings(once) == once
    assert same(once, json.dumps(merged))
    assert merged["features"]["cdi"] is True and merged["live-restore"] is True
    ours = {"features", "live-restore", "log-driver", "log-opts", "cdi-spec-dirs"}
    for key, value in current.items():
        if key not in ours:
            assert json.dumps(merged[key], sort_keys=True) == json.dumps(value, sort_keys=True)
    if isinstance(current.get("features"), dict):
        assert merged["features"] == {**current["features"], "cdi": True}
    if "log-driver" in current:
        assert merged["log-driver"] == current["log-driver"]


@pytest.mark.parametrize(
    ("current", "wanted"),
    [
        ({}, {"log-driver": "local", "log-opts": BOUNDS}),
        # Docker's default driver keeps everything for ever; its options are its own.
        ({"log-opts": {"tag": "x"}}, {"log-opts": {"tag": "x", **BOUNDS}}),
        ({"log-driver": "json-file"}, {"log-driver": "json-file", "log-opts": BOUNDS}),
        (
            {"log-driver": "local", "log-opts": {"max-size": "1g"}},
            {"log-driver": "local", "log-opts": {"max-size": "1g", "max-file": BOUNDS["max-file"]}},
        ),
        ({"log-driver": "journald"}, {"log-driver": "journald"}),
        (
            {"log-driver": "syslog", "log-opts": {"syslog-address": "udp://192.0.2.9:514"}},
            {"log-driver": "syslog", "log-opts": {"syslog-address": "udp://192.0.2.9:514"}},
        ),
    ],
)
def test_logs_of_somebody_else(current: dict[str, Any], wanted: dict[str, Any]) -> None:
    merged = json.loads(daemon_settings(json.dumps(current)))

    assert {key: value for key, value in merged.items() if key.startswith("log-")} == wanted


@pytest.mark.parametrize(
    ("folders", "wanted"),
    [
        (["/srv/cdi"], ["/srv/cdi", SPECIFICATIONS[0]]),
        (["/etc/cdi", "/run/cdi/"], ["/etc/cdi", "/run/cdi/"]),
        (["/var/run/cdi"], ["/var/run/cdi"]),
    ],
)
def test_folders_of_specifications_get_ours(folders: list[str], wanted: list[str]) -> None:
    assert json.loads(daemon_settings(json.dumps({"cdi-spec-dirs": folders})))["cdi-spec-dirs"] == wanted


@pytest.mark.parametrize("sharing", ["time-slice", "exclusive", ""])
def test_mapped_users_are_somebody_elses_choice_without_mps(sharing: str) -> None:
    text = '{"userns-remap": "default"}'

    assert json.loads(daemon_settings(text, sharing))["userns-remap"] == "default"
    with pytest.raises(GpulabError, match="shared by MPS"):
        daemon_settings(text, "mps")
    assert "userns-remap" in daemon_settings('{"userns-remap": ""}', "mps")


@pytest.mark.parametrize(
    ("text", "place", "line"),
    [
        ('{\n  "a": 1\n  "b": 2\n}\n', "line 3, column 3", '"b": 2'),
        ('{\n  "a": 1,\n', "line 3, column 1", '"a": 1,'),
        ("{'a': 1}", "line 1, column 2", "{'a': 1}"),
    ],
)
def test_broken_file_is_shown_by_line_and_column(text: str, place: str, line: str) -> None:
    with pytest.raises(GpulabError) as refused:
        parsed(text)

    assert place in refused.value.brief
    assert f"The line: {line}\n" in refused.value.details


@pytest.mark.parametrize("text", ["[]", "1", '"x"', "null"])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(GpulabError, match="not a JSON object"):
        parsed(text)


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_absent_and_empty_are_nothing(text: str | None) -> None:
    assert parsed(text) == {}


def test_one_is_not_true() -> None:
    """Docker would not start with it."""
    assert not same('{"live-restore": 1}', '{"live-restore": true}')
    assert same('{ "b": 1, "a": [] }', '{"a": [], "b": 1}')
    assert not same("{", "{}")


# An engine that starts unless its file has the word `bad`, and says in the journal why not.
SYSTEMCTL = """#!/bin/sh
echo "$@" >> "$FOLDER/calls"
case $1 in
    restart) if grep -q bad "$FOLDER/daemon.json"; then
        cp "$FOLDER/daemon.json" "$FOLDER/failed-with"
        exit 1
    fi;;
esac
"""
JOURNALCTL = """#!/bin/sh
cat <<'END'
Starting up
unable to configure the Docker daemon with file /etc/docker/daemon.json: hosts: (from flag: [fd://], from file: [bad])
time="2026-11-28T22:00:00Z" level=info msg="something later"
END
"""


class Engine:
    """A guest with one file and its kept versions."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.file, self.versions = folder, folder / "daemon.json", folder / "versions"
        for name, text in (("systemctl", SYSTEMCTL), ("journalctl", JOURNALCTL)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("FOLDER", str(folder))

    def kept(self, name: str, text: str = "") -> None:
        path = Path(f"{self.versions}{self.file}") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o640)

    def restart(self, written: bool = True) -> subprocess.CompletedProcess[str]:
        script = program(files.__file__.replace("files.py", "containers/engine.py"), "settings")
        order = {"path": str(self.file), "versions": str(self.versions), "written": written, "followers": ["a.service"]}
        command = [sys.executable, "-c", script, json.dumps(order)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(tmp_path, monkeypatch)


def test_engine_that_starts_keeps_the_new_file(engine: Engine) -> None:
    engine.file.write_text("good")
    engine.kept("before-1", "older")

    assert engine.restart().returncode == 0
    assert engine.file.read_text() == "good"
    assert "restart docker.service" in engine.calls()


def test_engine_that_does_not_start_gets_the_file_before(engine: Engine) -> None:
    engine.file.write_text("bad")
    engine.kept("before-9", "bad too")
    engine.kept("before-10", "as it was")

    done = engine.restart()

    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"Docker does not start with {engine.file}: unable to configure the Docker daemon with file "
        "/etc/docker/daemon.json: hosts: (from flag: [fd://], from file: [bad])",
        "The previous file is back, and Docker runs with it.",
    ]
    assert engine.file.read_text() == "as it was"
    assert engine.file.stat().st_mode & 0o777 == 0o640
    # What went down with the engine is up again.
    assert engine.calls()[-1] == "start a.service"


def test_file_that_was_not_there_before_goes(engine: Engine) -> None:
    engine.file.write_text("bad")
    engine.kept("before-1.absent")

    done = engine.restart()

    assert not engine.file.exists()
    assert "Docker runs with it" in done.stderr


def test_previous_file_that_does_not_help_is_back_all_the_same(engine: Engine) -> None:
    engine.file.write_text("bad")
    engine.kept("before-1", "bad before")

    done = engine.restart()

    assert engine.file.read_text() == "bad before"
    assert "The previous file is back, and Docker does not start with it: unable to configure" in done.stderr


def test_file_that_was_not_written_now_is_left_alone(engine: Engine) -> None:
    """Somebody broke it by hand: it is theirs."""
    engine.file.write_text("bad by hand")
    engine.kept("before-1", "older")

    done = engine.restart(written=False)

    assert done.returncode == 1
    assert engine.file.read_text() == "bad by hand"
    assert done.stderr.count("\n") == 1

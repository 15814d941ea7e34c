# SPDX-License-Identifier: MIT
"""What the programs on the guest do at Ollama's API: models pulled, made of files and removed, and what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from operations.containers.ollama import _MODELS, OllamaFacts
from tests.rehearsal.ollama_server import Start, servers

Ended = subprocess.CompletedProcess[str]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with servers(tmp_path) as begin:
        yield begin


@pytest.fixture
def url(start: Start) -> str:
    return start()


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """A model of a user's own file, as the inventory declares it."""
    path = tmp_path / "own.gguf"
    path.write_bytes((tmp_path / "opt/available/tiny_latest.gguf").read_bytes())
    return {"name": "own", "gguf": str(path), "sha256": sha256(path)}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run(url: str, **order: Any) -> Ended:
    given = {"url": url, "make": [], "pull": [], "keep": None, **order}
    argv = [sys.executable, "-c", _MODELS.strip(), json.dumps(given)]
    return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)


def pull(name: str, digest: str | None = None) -> dict[str, Any]:
    return {"name": name, "digest": digest}


def models(url: str) -> dict[str, str]:
    return {model["name"]: model["digest"] for model in requests.get(f"{url}/api/tags").json()["models"]}


def requested(folder: Path) -> str:
    """What the first server was asked."""
    return (folder / "log0").read_text()


def test_what_is_absent_is_pulled_and_told_in_a_few_lines(url: str) -> None:
    done = run(url, pull=[pull("tiny")])

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "pulling tiny: 100 % of 0.5 MB\n"
    assert list(models(url)) == ["tiny:latest"]


def test_what_is_there_is_not_pulled_again(url: str, tmp_path: Path) -> None:
    run(url, pull=[pull("tiny")])
    digest = models(url)["tiny:latest"]

    done = run(url, pull=[pull("tiny", digest)])

    assert (done.returncode, done.stdout) == (0, "")
    assert requested(tmp_path).count("/api/pull") == 1


def test_another_digest_than_declared_is_told_with_both_and_the_model_stays(url: str, tmp_path: Path) -> None:
    run(url, pull=[pull("tiny")])
    digest = models(url)["tiny:latest"]

    done = run(url, pull=[pull("tiny", 64 * "a")])

    assert done.returncode == 1
    assert done.stderr == (
        f"model tiny: its digest is {digest}, declared is {64 * 'a'}; the model stays as it was pulled\n"
    )
    assert models(url) == {"tiny:latest": digest}
    assert requested(tmp_path).count("/api/pull") == 2


def test_an_unknown_name_fails_in_ollamas_words_and_leaves_the_others_alone(url: str) -> None:
    done = run(url, pull=[pull("nosuch"), pull("tiny")])

    assert done.returncode == 1
    assert done.stderr == "model nosuch: pull model manifest: file does not exist\n"
    assert list(models(url)) == ["tiny:latest"]


def test_a_registry_that_is_away_costs_nothing_that_is_there(start: Start) -> None:
    run(start(), pull=[pull("tiny")])
    away = start(GPULAB_STAND_IN_MODELS="away")

    done = run(away, pull=[pull("tiny"), pull("other")], keep=["tiny:latest"])

    assert done.returncode == 1
    assert "model other: pull model manifest: Get" in done.stderr
    assert "no such host" in done.stderr
    assert list(models(away)) == ["tiny:latest"]


def test_a_model_is_made_of_a_file_once(url: str, own: dict[str, Any], tmp_path: Path) -> None:
    done = run(url, make=[own])

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "checking the file of own: 100 % of 0.5 MB\n"
        f"handing {own['gguf']} to Ollama: 0.5 MB\n"
        f"made own of {own['gguf']}\n"
    )
    # Its file is not even needed any more.
    Path(own["gguf"]).unlink()
    assert run(url, make=[own]).stdout == ""
    assert requested(tmp_path).count("/api/create") == 1


def test_a_file_that_ollama_has_already_is_not_handed_over(url: str, own: dict[str, Any], tmp_path: Path) -> None:
    run(url, make=[own])

    done = run(url, make=[{**own, "name": "again"}])

    assert done.stdout == f"made again of {own['gguf']}\n"
    assert requested(tmp_path).count('"POST /api/blobs') == 1


def test_a_changed_file_is_refused_until_its_sha256_is_declared(url: str, own: dict[str, Any]) -> None:
    run(url, make=[own])
    path = Path(own["gguf"])
    # A byte of the last tensor.
    path.write_bytes(path.read_bytes()[:-1] + b"\0")

    refused = run(url, make=[{**own, "sha256": 64 * "a"}])
    assert refused.returncode == 1
    assert refused.stderr == f"model own: {path}: its SHA-256 is {sha256(path)}, declared is {64 * 'a'}\n"

    made = run(url, make=[{**own, "sha256": sha256(path)}])
    assert (made.returncode, made.stderr) == (0, "")
    shown = requests.post(f"{url}/api/show", json={"model": "own"}).json()["modelfile"]
    assert sha256(path) in shown


def test_a_broken_file_is_refused_in_ollamas_words_and_the_model_before_stays(url: str, own: dict[str, Any]) -> None:
    run(url, make=[own], pull=[pull("tiny")])
    before, path = models(url), Path(own["gguf"])
    path.write_bytes(path.read_bytes()[: 100 * 1024])

    done = run(url, make=[{**own, "sha256": sha256(path)}])

    assert done.returncode == 1
    assert "exceeds file size (102400)" in done.stderr
    assert models(url) == before


def test_an_absent_file_is_told(url: str, own: dict[str, Any]) -> None:
    Path(own["gguf"]).unlink()
    assert run(url, make=[own]).stderr == f"model own: {own['gguf']}: No such file or directory\n"


def test_others_go_once_what_is_declared_is_there(url: str, own: dict[str, Any]) -> None:
    run(url, make=[own], pull=[pull("tiny")])

    failed = run(url, pull=[pull("nosuch")], keep=["nosuch:latest"])
    assert failed.returncode == 1
    assert len(models(url)) == 2

    done = run(url, keep=["tiny:latest"])
    assert (done.returncode, done.stdout) == (0, "removed own:latest\n")
    assert list(models(url)) == ["tiny:latest"]


def test_a_server_that_is_gone_is_told(url: str) -> None:
    done = run("http://127.0.0.1:9", pull=[pull("tiny")])

    assert (done.returncode, done.stderr) == (1, "model tiny: <urlopen error [Errno 111] Connection refused>\n")


@pytest.fixture
def fact(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What the fact's program prints on this machine, which has no engine."""

    def read(**arguments: Any) -> dict[str, Any]:
        words = OllamaFacts().command(**arguments).bits
        argv = [getattr(word, "obj", word) for word in words]
        done = subprocess.run(
            [sys.executable, *argv[1:]], capture_output=True, text=True, check=True, env={"PATH": str(tmp_path)}
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return read


def test_the_fact_says_what_models_are_made_of(
    url: str, own: dict[str, Any], fact: Callable[..., dict[str, Any]]
) -> None:
    run(url, make=[own])

    found = fact(probes={"models": f"{url}/api/tags"}, url=url, of_files=["own", "absent"])

    assert found["made_of"] == {"own": own["sha256"], "absent": None}
    assert [model["name"] for model in found["answers"]["models"]["body"]["models"]] == ["own:latest"]

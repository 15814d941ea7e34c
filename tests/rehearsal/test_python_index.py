# SPDX-License-Identifier: MIT
"""The lab's Python index: its pages, and pip that installs from it over TLS."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from inventory.access import PythonIndex
from rehearsal import ca
from rehearsal.python_index import service


def write_wheel(folder: Path, name: str = "Tiny_Thing", version: str = "1.0") -> Path:
    """A wheel of one module."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        "tiny.py": b"ANSWER = 42\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for file, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{file},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return path


def fetch(requirements: Sequence[str], python: str, target: Path) -> None:
    write_wheel(target)


def test_index_is_filled_once_and_again_when_its_list_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(requirements: Sequence[str], python: str, target: Path) -> None:
        asked.append(python)
        fetch(requirements, python, target)

    service.prepare(tmp_path, counted)
    service.prepare(tmp_path, counted)
    assert asked == ["3.13", "3.11"]
    page = (tmp_path / "www/simple/tiny-thing/index.html").read_text()
    wheel = tmp_path / "www/files/Tiny_Thing-1.0-py3-none-any.whl"
    assert f"../../files/{wheel.name}#sha256={hashlib.sha256(wheel.read_bytes()).hexdigest()}" in page
    monkeypatch.setattr(service, "PACKAGES", {"3.13": ["other==1"]})
    service.prepare(tmp_path, counted)
    assert asked == ["3.13", "3.11", "3.13"]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """URL and CA of a running index with one package."""
    service.prepare(tmp_path / "index", fetch)
    authority = ca.authority(tmp_path / "ca")
    pair = authority.issue("python-index", ["127.0.0.1"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "rehearsal.python_index", "--address", "127.0.0.1", "--port", str(port)]
    argv += ["--certificate", str(pair.certificate), "--key", str(pair.key), str(tmp_path / "index/www")]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            yield f"https://127.0.0.1:{port}/simple", authority.certificate
        finally:
            process.terminate()


def test_pip_takes_a_package_by_its_hash_over_tls_and_no_other(served: tuple[str, Path], tmp_path: Path) -> None:
    url, certificate = served
    assert PythonIndex.model_validate({"url": url, "ca": str(certificate)}).url == url
    wheel = tmp_path / "index/www/files/Tiny_Thing-1.0-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()

    def pip(name: str, expected: str, authority: Path = certificate) -> subprocess.CompletedProcess[str]:
        lock = tmp_path / f"{name}.txt"
        lock.write_text(f"tiny-thing==1.0 --hash=sha256:{expected}\n")
        argv = [sys.executable, "-m", "pip", "install", "--isolated", "--no-cache-dir", "--retries=0", "--no-deps"]
        argv += ["--disable-pip-version-check", "--index-url", url, "--cert", str(authority), "--require-hashes"]
        argv += ["--target", str(tmp_path / name), "--requirement", str(lock)]
        environment = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull}
        return subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)

    done = pip("right", digest)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "right/tiny.py").read_text() == "ANSWER = 42\n"
    wrong = pip("wrong", "0" * 64)
    assert wrong.returncode != 0
    assert "DO NOT MATCH THE HASHES" in wrong.stderr
    stranger = ca.authority(tmp_path / "stranger").certificate
    assert pip("stranger", digest, stranger).returncode != 0

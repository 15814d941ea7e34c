# SPDX-License-Identifier: MIT
"""Images without a container engine, through a real registry on the loopback address."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from inventory import GpulabError
from rehearsal import ca
from rehearsal.registry import fixture, oci, server
from rehearsal.registry.ollama import recipe as ollama
from rehearsal.registry.recipe import kept, safe

needs_registry = pytest.mark.skipif(
    shutil.which("docker-registry") is None, reason="no docker-registry here; `apt install docker-registry` supplies it"
)


@pytest.fixture
def tiny(tmp_path: Path) -> oci.Image:
    """An image of one file and one program."""
    layers = tmp_path / "layers"
    layers.mkdir()
    files: dict[str, bytes | Path] = {"etc/motd": b"simulated\n", "usr/bin/tool": b"#!/bin/sh\n"}
    layer = oci.layer_of_files(files, layers, executable=["usr/bin/tool"])
    return oci.image([layer], oci.Settings(["/usr/bin/tool"], labels={"org.gpulab.stand-in": "simulated"}))


@pytest.fixture
def running(tmp_path: Path) -> Iterator[oci.Registry]:
    with server.temporary(tmp_path / "store", tmp_path / "registry.yml", server.program()) as found:
        yield found


def test_same_files_give_the_same_digest(tmp_path: Path) -> None:
    files: dict[str, bytes | Path] = {"b": b"2", "a/c": b"1"}
    first, second = (oci.layer_of_files(dict(order), tmp_path) for order in (files.items(), reversed(files.items())))
    assert first == second
    assert first.digest == f"sha256:{hashlib.sha256(first.path.read_bytes()).hexdigest()}"
    assert first.diff_id == f"sha256:{hashlib.sha256(gzip.decompress(first.path.read_bytes())).hexdigest()}"


def test_layer_of_a_tar_is_sorted_and_timeless(tmp_path: Path) -> None:
    def archive(name: str, seconds: int, names: list[str]) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for member in names:
                info = tarfile.TarInfo(f"./{member}")
                info.mtime, info.size = seconds, 1
                tar.addfile(info, io.BytesIO(b"x"))
            link = tarfile.TarInfo("./link")
            link.type, link.linkname = tarfile.LNKTYPE, "./kept"
            tar.addfile(link)
        return tmp_path / name

    one = oci.layer_of_tar(archive("1.tar", 1, ["kept", "var/log/x"]), tmp_path, keep=kept)
    two = oci.layer_of_tar(archive("2.tar", 2, ["var/log/x", "kept"]), tmp_path, keep=kept)
    assert one == two
    with tarfile.open(one.path) as tar:
        assert [(member.name, member.linkname) for member in tar] == [("kept", ""), ("link", "kept")]


@needs_registry
def test_pushed_image_is_fetched_by_its_digest(running: oci.Registry, tiny: oci.Image) -> None:
    digest = running.push("lab/tiny", tiny)
    assert digest == tiny.digest
    manifest = json.loads(running.manifest("lab/tiny", digest))
    assert manifest["mediaType"] == oci.MANIFEST
    config = json.loads(running.blob("lab/tiny", manifest["config"]["digest"]))
    assert config["config"]["Labels"] == {"org.gpulab.stand-in": "simulated"}
    layer = running.blob("lab/tiny", manifest["layers"][0]["digest"])
    with tarfile.open(fileobj=io.BytesIO(layer)) as tar:
        assert [(member.name, member.mode) for member in tar if member.isfile()] == [
            ("etc/motd", 0o644), ("usr/bin/tool", 0o755),
        ]  # fmt: skip


@needs_registry
def test_second_push_sends_no_layer_again(
    running: oci.Registry, tiny: oci.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    running.push("lab/tiny", tiny)
    sent: list[str] = []
    request = oci.Registry._request

    def counted(self: oci.Registry, method: str, path: str, **options: object) -> object:
        sent.append(method)
        return request(self, method, path, **options)

    monkeypatch.setattr(oci.Registry, "_request", counted)
    running.push("lab/tiny", tiny)
    assert sent == ["HEAD", "HEAD", "PUT"]


@needs_registry
def test_unknown_image_is_refused(running: oci.Registry) -> None:
    with pytest.raises(GpulabError, match="The lab's registry refused lab/none@latest: 404, expected 200"):
        running.manifest("lab/none", "latest")


@needs_registry
def test_registry_speaks_tls_under_the_labs_ca(tmp_path: Path) -> None:
    import subprocess

    authority = ca.authority(tmp_path / "ca")
    pair = authority.issue("registry", ["127.0.0.1"])
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = server.write_settings(
        tmp_path / "registry.yml", tmp_path / "store", "127.0.0.1", port, pair.certificate, pair.key
    )
    assert settings.stat().st_mode & 0o777 == 0o600
    with subprocess.Popen([str(server.program()), "serve", str(settings)], stderr=subprocess.DEVNULL) as process:
        try:
            server.wait(oci.Registry(f"https://127.0.0.1:{port}", authority.certificate), process)
        finally:
            process.terminate()


def test_image_of_the_stand_in_runs_as_the_real_one_does(tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    built = ollama.assemble([], tmp_path, tmp_path / "layers")
    config = json.loads(built.config)["config"]
    assert (config["Entrypoint"], config["Cmd"]) == (["/bin/ollama"], ["serve"])
    assert "OLLAMA_HOST=0.0.0.0:11434" in config["Env"]
    assert config["Labels"]["org.gpulab.stand-in"] == "simulated"
    with tarfile.open(built.layers[-1].path) as tar:
        names = tar.getnames()
    assert {"usr/bin/ollama", "opt/ollama/server.py", "opt/ollama/available/tiny_latest.gguf"} <= set(names)
    again = tmp_path / "again"
    again.mkdir()
    assert ollama.assemble([], again, again).digest == built.digest


def test_tiny_model_is_the_same_each_time(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for path in paths:
        fixture.write_tiny(path)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../b"])
def test_wheel_cannot_write_outside_its_folder(name: str) -> None:
    assert not safe(name)
    assert safe("xllamacpp/__init__.py")

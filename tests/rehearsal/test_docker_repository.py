# SPDX-License-Identifier: MIT
"""Docker's repository of the lab, read as apt reads it; Debian's packages in it are stand-ins here."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from rehearsal.docker import packages, service
from rehearsal.nvidia.deb import Package, pack, text, unpack

VERSIONS = {
    "docker.io": "26.1.5+dfsg1-9+deb13u1+b1",
    "docker-cli": "26.1.5+dfsg1-9+deb13u1+b1",
    "containerd": "1.7.24~ds1-6+deb13u1",
    "runc": "1.1.5+ds1-1+deb12u1",
    "tini": "0.19.0-3+b8",
}
FILES = {
    "docker.io": ["/usr/sbin/dockerd", "/usr/sbin/docker-proxy"],
    "docker-cli": ["/usr/bin/docker"],
    "containerd": ["/usr/bin/containerd", "/usr/bin/containerd-shim-runc-v2", "/usr/bin/ctr"],
    "runc": ["/usr/sbin/runc"],
    "tini": ["/usr/bin/tini-static"],
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    debs = tmp_path_factory.mktemp("debian")

    def debian(names: Sequence[str], suite: str) -> list[Path]:
        found = []
        for name in names:
            assert name in packages.DEBIAN[suite]
            files = {path: text(f"{name} of {suite}", 0o755) for path in FILES[name]}
            package = Package(name, VERSIONS[name], name, files)
            found.append(debs / package.filename)
            found[-1].write_bytes(pack(package))
        return found

    return service.prepare(tmp_path_factory.mktemp("docker"), debian) / "www"


def test_apt_finds_dockers_packages_in_dockers_layout(built: Path, tmp_path: Path) -> None:
    for name in ("etc", "state/lists/partial", "cache/archives/partial"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "status").touch()
    # As download.docker.com: a dists tree below the distribution's folder, and an armoured key beside it.
    key = "".join(f"\n {line or '.'}" for line in (built / "debian/gpg").read_text().splitlines())
    (tmp_path / "etc/docker.sources").write_text(
        f"Types: deb\nURIs: file:{built}/debian\nSuites: bookworm\nComponents: stable\nSigned-By:{key}\n"
    )
    options = [
        f"-oDir::Etc={tmp_path}/etc", f"-oDir::Etc::sourceparts={tmp_path}/etc", "-oDir::Etc::sourcelist=/dev/null",
        f"-oDir::State={tmp_path}/state", f"-oDir::State::status={tmp_path}/status", f"-oDir::Cache={tmp_path}/cache",
        "-oAPT::Sandbox::User=root", "-oAPT::Architecture=amd64", "-oAcquire::Languages=none",
        "-oDebug::NoLocking=1", "-oAPT::Update::Error-Mode=any",
    ]  # fmt: skip
    done = subprocess.run(["apt-get", *options, "update"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(
        ["apt-cache", *options, "madison", "docker-ce", "docker-ce-cli", "containerd.io"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert [tuple(word.strip() for word in line.split("|")[:2]) for line in shown.splitlines()] == [
        ("docker-ce", "5:26.1.5-1~debian.12~bookworm"),
        ("docker-ce-cli", "5:26.1.5-1~debian.12~bookworm"),
        ("containerd.io", "1.7.24-1"),
    ]
    done = subprocess.run(
        ["apt-get", *options, "download", "docker-ce"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_programs_are_debians_where_dockers_packages_have_them(built: Path) -> None:
    files = {}
    for deb in (built / "debian" / service.POOL).glob("*.deb"):
        files |= unpack(deb)
    assert files["/usr/bin/dockerd"] == text("docker.io of trixie", 0o755)
    assert files["/usr/bin/docker-init"] == text("tini of trixie", 0o755)
    assert files["/usr/bin/runc"] == text("runc of bookworm", 0o755)
    assert "/usr/lib/systemd/system/docker.socket" in files


def test_description_says_whose_engine_it_is(built: Path) -> None:
    listed = (built / "debian/dists/bookworm/stable/binary-amd64/Packages").read_text()
    assert "Description: real Docker Engine 26.1.5 of Debian 13 under Docker's package names (rehearsal)" in listed
    assert "containerd 1.7.24 of Debian 13 and runc 1.1.5 of Debian 12" in listed


def test_second_prepare_builds_nothing(built: Path) -> None:
    assert service.prepare(built.parent, lambda names, suite: []) == built.parent

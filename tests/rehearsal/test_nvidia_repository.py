# SPDX-License-Identifier: MIT
"""The lab's NVIDIA repositories, read as apt reads them."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from rehearsal.nvidia import packages, service
from rehearsal.nvidia.deb import File, Package, pack, text, unpack

CUDA = "compute/cuda/repos/debian13/x86_64"
TOOLKIT = "libnvidia-container/stable/deb/amd64"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def mps_of(folder: Path) -> service.Fetch:
    """In place of the download from Debian: a package with the same files."""

    def fetch(names: Sequence[str]) -> list[Path]:
        programs = {
            "/usr/bin/nvidia-cuda-mps-control": text("control", 0o755),
            "/usr/sbin/nvidia-cuda-mps-server": text("server", 0o755),
        }
        package = Package("nvidia-cuda-mps", "550.163.01-2", "MPS", {**programs, "/usr/share/doc/x": text("x")})
        (folder / package.filename).write_bytes(pack(package))
        return [folder / package.filename for _ in names]

    return fetch


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[service.Repository, Path, str]]:
    """Both repositories, built and served on the loopback address: (description, folder, URL)."""
    folder = tmp_path_factory.mktemp("nvidia")
    (folder / "www").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    yield service.prepare(folder, url, mps_of(tmp_path_factory.mktemp("debian"))), folder, url
    server.shutdown()
    server.server_close()


class Apt:
    """apt in a folder of its own: its sources, its pins, its state."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("etc/preferences.d", "state/lists/partial", "cache/archives/partial", "etc/trusted.gpg.d"):
            (root / name).mkdir(parents=True)
        (root / "status").touch()
        self.options = [
            f"-oDir::Etc={root}/etc", f"-oDir::State={root}/state", f"-oDir::Cache={root}/cache",
            f"-oDir::State::status={root}/status", "-oDir::Etc::sourceparts=-", "-oDir::Etc::sourcelist=sources.list",
            "-oAPT::Sandbox::User=root", "-oAPT::Architecture=amd64", "-oAcquire::Languages=none",
            "-oAcquire::http::Proxy=DIRECT", "-oDebug::NoLocking=1",
        ]  # fmt: skip

    def source(self, line: str) -> None:
        with open(self.root / "etc/sources.list", "a") as file:
            file.write(f"{line}\n")

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *self.options, *words], capture_output=True, text=True, check=False)

    def candidate(self, package: str) -> str:
        lines = self.run("apt-cache", "policy", package).stdout.splitlines()
        return next(line.split()[1] for line in lines if line.strip().startswith("Candidate:"))


@pytest.fixture
def apt(built: tuple[service.Repository, Path, str], tmp_path: Path) -> Apt:
    """apt with NVIDIA's CUDA repository alone, updated."""
    return apt_with(built, tmp_path, CUDA)


def apt_with(built: tuple[service.Repository, Path, str], root: Path, repository: str) -> Apt:
    _, folder, url = built
    apt = Apt(root)
    apt.source(f"deb [signed-by={folder}/www/{repository}/cuda-archive-keyring.gpg] {url}/{repository}/ /")
    done = apt.run("apt-get", "update")
    assert done.returncode == 0, done.stderr
    # Packages of Debian that ours depend on; they are not what is asked here.
    (apt.root / "status").write_text(
        "".join(
            f"Package: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: amd64\n"
            "Multi-Arch: allowed\nMaintainer: x\nDescription: x\n\n"
            for name, version in (("libc6", "2.41-12"), ("python3", "3.13.5-1"), ("kmod", "34.2-2"))
        )
    )
    return apt


def pin(built: tuple[service.Repository, Path, str], apt: Apt, name: str) -> None:
    """Put the preferences of a pinning package where apt reads them."""
    _, folder, _ = built
    (deb,) = (folder / "www" / CUDA).glob(f"nvidia-driver-pinning-{name}_*.deb")
    unpacked = apt.root / "pin"
    subprocess.run(["dpkg-deb", "-x", str(deb), str(unpacked)], check=True)
    (apt.root / "etc/preferences.d/nvidia").write_bytes(
        (unpacked / "etc/apt/preferences.d/nvidia-driver-pinning").read_bytes()
    )


def test_without_a_pin_the_newest_branch_is_the_candidate(apt: Apt) -> None:
    assert apt.candidate("nvidia-driver-cuda") == "590.44.01-1"


@pytest.mark.parametrize(("name", "version"), [("580", "580.105.08-1"), ("580.95.05", "580.95.05-1")])
def test_pinning_package_holds_every_driver_package(
    built: tuple[service.Repository, Path, str], apt: Apt, name: str, version: str
) -> None:
    """The pin goes by source package, so libraries whose own name lacks `nvidia` are held as well."""
    pin(built, apt, name)
    for package in (
        "nvidia-driver-cuda",
        "nvidia-kernel-open-dkms",
        "libcuda1",
        "libnvidia-ml1",
        "nvidia-persistenced",
    ):
        assert apt.candidate(package) == version


def test_one_version_brings_only_packages_of_that_version(
    built: tuple[service.Repository, Path, str], apt: Apt
) -> None:
    pin(built, apt, "580.95.05")
    done = apt.run("apt-get", "install", "--simulate", "nvidia-driver-cuda", "nvidia-kernel-open-dkms")
    assert done.returncode == 0, done.stderr + done.stdout
    assert set(chosen(done.stdout).values()) == {"580.95.05-1"}
    assert "nvidia-persistenced" in chosen(done.stdout)


def chosen(output: str) -> dict[str, str]:
    """What `apt-get --simulate` would install: package to version."""
    lines = [line.split() for line in output.splitlines() if line.startswith("Inst ")]
    return {words[1]: words[2].lstrip("(") for words in lines}


def test_cuda_meta_package_brings_a_driver_and_a_toolkit_does_not(apt: Apt) -> None:
    toolkits = apt.run("apt-get", "install", "--simulate", "cuda-toolkit-12-9", "cuda-toolkit-13-0").stdout
    assert not [name for name in chosen(toolkits) if "driver" in name]
    assert chosen(apt.run("apt-get", "install", "--simulate", "cuda").stdout)["nvidia-driver-cuda"] == "590.44.01-1"


def test_pin_keeps_out_a_foreign_package_that_wants_another_branch(
    built: tuple[service.Repository, Path, str], apt: Apt
) -> None:
    assert apt.run("apt-get", "install", "--simulate", "acme-gpu-tool").returncode == 0
    pin(built, apt, "580")
    done = apt.run("apt-get", "install", "--simulate", "acme-gpu-tool")
    assert done.returncode == 100
    assert "acme-gpu-tool : Depends: nvidia-driver-cuda (>= 590)" in done.stdout + done.stderr


def test_driver_that_does_not_build_is_only_in_the_broken_repository(
    built: tuple[service.Repository, Path, str], apt: Apt, tmp_path: Path
) -> None:
    pin(built, apt, "580")
    assert apt.candidate("nvidia-kernel-open-dkms") == "580.105.08-1"
    broken = apt_with(built, tmp_path / "broken", f"{service.BROKEN}/{CUDA}")
    pin(built, broken, "580")
    assert broken.candidate("nvidia-kernel-open-dkms") == f"{packages.BROKEN_DRIVER[0]}-1"


def test_debian_12_is_offered_the_same_packages(built: tuple[service.Repository, Path, str], tmp_path: Path) -> None:
    _, folder, _ = built
    debian_12 = CUDA.replace("debian13", "debian12")
    assert apt_with(built, tmp_path, debian_12).candidate("nvidia-driver-cuda") == "590.44.01-1"
    names = [{path.name for path in (folder / "www" / place).glob("*.deb")} for place in (CUDA, debian_12)]
    assert names[0] == names[1]


def test_driver_package_holds_debians_mps_and_says_so(built: tuple[service.Repository, Path, str]) -> None:
    _, folder, _ = built
    files = unpack(folder / "www" / CUDA / "nvidia-driver-cuda_580.105.08-1_amd64.deb")
    assert files["/usr/bin/nvidia-cuda-mps-control"] == text("control", 0o755)
    assert files["/usr/bin/nvidia-cuda-mps-server"] == text("server", 0o755)
    note = files["/usr/share/doc/nvidia-driver-cuda/README.rehearsal"]
    assert isinstance(note, File)
    assert b"Debian's package nvidia-cuda-mps_550.163.01-2_amd64.deb" in note.content


@pytest.mark.parametrize("repository", [CUDA, TOOLKIT])
def test_release_is_signed_by_the_published_key(
    built: tuple[service.Repository, Path, str], repository: str, tmp_path: Path
) -> None:
    _, folder, _ = built
    key = folder / "www" / CUDA / "cuda-archive-keyring.gpg"
    if repository == TOOLKIT:
        key = tmp_path / "key.gpg"
        armoured = folder / "www/libnvidia-container/gpgkey"
        subprocess.run(["gpg", "--dearmor", "--output", str(key), str(armoured)], check=True)
    files = folder / "www" / repository
    for signed in ([str(files / "InRelease")], [str(files / "Release.gpg"), str(files / "Release")]):
        done = subprocess.run(["gpgv", "--keyring", str(key), *signed], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_altered_index_is_refused(built: tuple[service.Repository, Path, str], apt: Apt) -> None:
    _, folder, _ = built
    release = folder / "www" / CUDA / "InRelease"
    original = release.read_bytes()
    try:
        release.write_bytes(original.replace(b"Origin: NVIDIA", b"Origin: nobody"))
        for old in (apt.root / "state/lists").glob("*Release*"):
            old.unlink()
        done = apt.run("apt-get", "update", "-oAPT::Update::Error-Mode=any")
    finally:
        release.write_bytes(original)
    assert done.returncode == 100
    assert "GPG error" in done.stderr or "not signed" in done.stderr


def test_digests_are_those_of_the_key_files(built: tuple[service.Repository, Path, str]) -> None:
    described, folder, url = built
    assert described.repository == f"{url}/compute/cuda/repos"
    for digest, path in (
        (described.key_sha256, f"www/{CUDA}/cuda-archive-keyring.gpg"),
        (described.toolkit_key_sha256, "www/libnvidia-container/gpgkey"),
    ):
        assert digest == hashlib.sha256((folder / path).read_bytes()).hexdigest()
    assert service.read(folder) == described


def test_second_prepare_builds_nothing(built: tuple[service.Repository, Path, str]) -> None:
    described, folder, url = built
    before = (folder / "www" / CUDA / "InRelease").stat().st_mtime_ns
    assert service.prepare(folder, url, lambda names: []) == described
    assert (folder / "www" / CUDA / "InRelease").stat().st_mtime_ns == before


def test_toolkit_packages_are_offered_in_two_versions(
    built: tuple[service.Repository, Path, str], tmp_path: Path
) -> None:
    _, folder, url = built
    apt = Apt(tmp_path / "apt")
    key = tmp_path / "key.asc"
    key.write_bytes((folder / "www/libnvidia-container/gpgkey").read_bytes())
    apt.source(f"deb [signed-by={key}] {url}/libnvidia-container/stable/deb/amd64 /")
    assert apt.run("apt-get", "update").returncode == 0
    listed = apt.run("apt-cache", "madison", "nvidia-container-toolkit-base").stdout
    assert [line.split("|")[1].strip() for line in listed.splitlines()] == ["1.20.0-1", "1.19.1-1"]


def test_package_is_one_that_dpkg_reads(tmp_path: Path) -> None:
    package = Package(
        "gpulab-test",
        "1.2-3",
        "a package",
        {"/usr/bin/tool": text("#!/bin/sh\n", 0o755), "/etc/tool.conf": File(b"x=1\n")},
        {"Depends": "libc6"},
        {"postinst": "true\n"},
        conffiles=("/etc/tool.conf",),
    )
    path = tmp_path / package.filename
    path.write_bytes(pack(package))
    shown = subprocess.run(["dpkg-deb", "--info", str(path)], capture_output=True, text=True, check=True).stdout
    listed = subprocess.run(["dpkg-deb", "--contents", str(path)], capture_output=True, text=True, check=True).stdout
    assert "Description: a package (simulated)" in shown
    assert "-rwxr-xr-x 0/0" in next(line for line in listed.splitlines() if line.endswith("./usr/bin/tool"))
    assert pack(package) == path.read_bytes()


@pytest.mark.parametrize("tool", sorted(set(packages.DIVERTED.values())))
def test_wrapper_is_valid_shell(tool: str, tmp_path: Path) -> None:
    script = tmp_path / tool
    script.write_bytes(packages.wrapper(tool).content)
    subprocess.run(["sh", "-n", str(script)], check=True)
    assert "simulated" in script.read_text()


def test_server_answers_with_keep_alive(tmp_path: Path) -> None:
    """`python -m rehearsal.nvidia` serves a folder; apt fetches dozens of packages over one connection."""
    import http.client
    import socket
    import time

    (tmp_path / "file").write_text("content")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "rehearsal.nvidia", "--address", "127.0.0.1", "--port", str(port), str(tmp_path)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 10
            while True:
                try:
                    connection = http.client.HTTPConnection("127.0.0.1", port)
                    connection.connect()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < deadline, "the server does not listen"
                    time.sleep(0.02)
            for _ in range(2):
                connection.request("GET", "/file")
                answer = connection.getresponse()
                assert (answer.status, answer.read()) == (200, b"content")
                assert "simulated" in answer.headers["Server"]
        finally:
            process.terminate()


def test_real_dkms_is_asked_about_the_kernels_of_the_guest(tmp_path: Path) -> None:
    """And the simulation about the control machine's, of which the guest has neither image nor headers."""
    script = packages.wrapper("dkms").content.decode()
    for path, place in {packages.HOME: "home", "/boot": "boot", "/lib/modules": "modules"}.items():
        script = script.replace(f"{path}/", f"{tmp_path}/{place}/")
    script = script.replace("/usr/bin/python3 -IS", "echo simulated")
    real = tmp_path / "home/diverted/dkms"

    def asked(*words: str) -> list[str]:
        done = subprocess.run(["sh", "-c", script, "dkms", *words], capture_output=True, text=True, check=True)
        return [line.split()[0] for line in done.stdout.splitlines()]

    assert asked("status") == ["simulated"]
    real.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\necho real\n")
    real.chmod(0o755)
    (tmp_path / "modules/6.12.1/build").mkdir(parents=True)
    assert asked("autoinstall", "-k", "6.12.1") == ["real"]
    assert asked("status") == ["simulated", "real"]
    assert asked("install", "nvidia/580.95.05") == ["simulated"]
    assert asked("install", "zfs/2.3") == ["real"]


def test_programs_run_with_the_c_library_of_debian_12(
    built: tuple[service.Repository, Path, str], tmp_path: Path
) -> None:
    """Whatever Debian the control machine has that they were compiled on."""
    _, folder, _ = built
    wanted = set()
    for name in ("libnvidia-ml1", "libcuda1", "nvidia-driver-cuda", "nvidia-persistenced"):
        for path, file in unpack(folder / "www" / CUDA / f"{name}_580.105.08-1_amd64.deb").items():
            if isinstance(file, File) and file.content.startswith(b"\x7fELF"):
                (tmp_path / "program").write_bytes(file.content)
                argv = ["objdump", "-T", str(tmp_path / "program")]
                listed = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
                wanted |= {(tuple(map(int, found.split("."))), path) for found in re.findall(r"GLIBC_([\d.]+)", listed)}
    assert wanted
    assert max(wanted) <= ((2, 36), "~")

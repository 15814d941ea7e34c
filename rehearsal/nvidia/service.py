# SPDX-License-Identifier: MIT
"""What the lab calls: `prepare()` builds NVIDIA's repositories into the cache, `start()` serves them on the bridge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from inventory import GpulabError
from rehearsal import image, network, paths, processes
from rehearsal.nvidia import packages
from rehearsal.nvidia.deb import File, Package, SigningKey, pack, unpack, write_repository

PORT = 8099
PROCESS = "nvidia-repository"
START_S = 10.0
CUDA = "compute/cuda/repos"
TOOLKIT = "libnvidia-container"
DISTRIBUTIONS = ("debian12/x86_64", "debian13/x86_64")
#: Below it the CUDA repository once more, with a newest driver of branch 580 whose module does not build.
BROKEN = "broken"

Fetch = Callable[[Sequence[str]], list[Path]]


@dataclass(frozen=True)
class Repository:
    """Where the repositories are served, in the terms of a guest's inventory (`nvidia.repository` and so on).

    The digests are SHA-256 of the key files, which is what an inventory pins for a repository without TLS.
    """

    repository: str
    key_sha256: str
    toolkit_repository: str
    toolkit_key_sha256: str


def prepare(folder: Path | None = None, base_url: str | None = None, debian: Fetch = image.download) -> Repository:
    """Build both repositories into `folder` (default: the cache), unless they are there from the same sources.

    `debian` brings packages of Debian, as files.

    Raises:
        GpulabError: no C compiler, GnuPG fails, or a package of Debian can't be had.
    """
    folder = folder or cache()
    base = base_url or url()
    stamp = folder / "key"
    wanted = _key(base)
    if not stamp.exists() or stamp.read_text() != wanted:
        stamp.unlink(missing_ok=True)
        print("building NVIDIA's package repositories (simulated)")
        _build(folder, base, debian)
        forget_downloads(folder / "www")
        stamp.write_text(wanted)
    return read(folder)


def read(folder: Path | None = None) -> Repository:
    """What `prepare()` built, from `repository.json`."""
    return Repository(**json.loads(((folder or cache()) / "repository.json").read_text()))


def start() -> dict[str, dict[str, str]]:
    """Serve the repositories on the bridge until the lab goes down; returns keys of an inventory, `nvidia`.

    Raises:
        GpulabError: the server does not listen within seconds.
    """
    serve(PROCESS, PORT, cache() / "www")
    return {"nvidia": asdict(read())}


def serve(process: str, port: int, folder: Path) -> None:
    """Serve a folder on the bridge until the lab goes down.

    Raises:
        GpulabError: the server does not listen within seconds.
    """
    gateway = network.current().gateway
    if not processes.running(process):
        argv = [sys.executable, "-m", "rehearsal.nvidia", "--address", gateway, "--port", str(port), str(folder)]
        processes.start(process, argv)
    wait_listening(process, port)


def wait_listening(process: str, port: int) -> None:
    """Until a process of the lab listens on the bridge.

    Raises:
        GpulabError: it does not within seconds.
    """
    gateway = network.current().gateway
    deadline = time.monotonic() + START_S
    while not _listens(gateway, port):
        if time.monotonic() > deadline or not processes.running(process):
            log = paths.logs() / f"{process}.log"
            raise GpulabError(f"{process} does not answer at {gateway}:{port}", log.read_text()[-500:])
        time.sleep(0.02)


def _listens(address: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((address, port)) == 0


def cache() -> Path:
    """The folder of the built repositories; `www` in it is what is served."""
    return paths.cache() / "nvidia"


def url() -> str:
    """Where the lab's hosts reach the repositories."""
    return f"http://{network.current().gateway}:{PORT}"


def _key(base: str) -> str:
    """A digest of all that the packages are made from."""
    digest = hashlib.sha256(base.encode())
    for path in sorted([*Path(__file__).parent.glob("*.py"), *packages.SOURCE.rglob("*")]):
        if path.is_file():
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _build(folder: Path, base: str, debian: Fetch) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    new = folder / "www.new"
    shutil.rmtree(new, ignore_errors=True)
    keys = {
        CUDA: SigningKey(folder / "keys/cuda", "gpulab rehearsal cuda (simulated)"),
        TOOLKIT: SigningKey(folder / "keys/toolkit", "gpulab rehearsal toolkit (simulated)"),
    }
    mps = real_mps(debian)
    try:
        for key in keys.values():
            key.make()
        listed = _packed(_cuda_packages(mps))
        for name in DISTRIBUTIONS:
            _write_cuda(new / CUDA / name, f"{base}/{CUDA}/{name}", keys[CUDA], listed)
        version, cuda = packages.BROKEN_DRIVER
        broken = _packed(_driver(replace(compile_driver(version, cuda), mps=mps, builds=False)))
        for name in DISTRIBUTIONS:
            place = f"{BROKEN}/{CUDA}/{name}"
            _write_cuda(new / place, f"{base}/{place}", keys[CUDA], [*listed, *broken])
        _write_toolkit(new / TOOLKIT, f"{base}/{TOOLKIT}", keys[TOOLKIT])
        described = Repository(
            f"{base}/{CUDA}",
            hashlib.sha256(keys[CUDA].public()).hexdigest(),
            f"{base}/{TOOLKIT}",
            hashlib.sha256(keys[TOOLKIT].public(armoured=True)).hexdigest(),
        )
    finally:
        for key in keys.values():
            key.close()
    shutil.rmtree(folder / "www", ignore_errors=True)
    new.rename(folder / "www")
    description = folder / "repository.json"
    # A new file: a copied cache may share the old one.
    description.unlink(missing_ok=True)
    description.write_text(json.dumps(asdict(described), indent=2) + "\n")


def real_mps(debian: Fetch) -> packages.Mps:
    """The programs of Debian's nvidia-cuda-mps."""
    (package,) = debian(["nvidia-cuda-mps"])
    programs = {path.rpartition("/")[2]: entry for path, entry in unpack(package).items() if "bin/nvidia-" in path}
    content = {name: entry.content for name, entry in programs.items() if isinstance(entry, File)}
    return packages.Mps(package.name, content)


def _driver(driver: packages.Driver) -> list[Package]:
    version = driver.version
    pinning = packages.pinning_packages(version, f"{version}-1", f"{version}*")
    return [*packages.driver_packages(driver), pinning]


def _cuda_packages(mps: packages.Mps) -> list[Package]:
    """All that the folders of the distributions have in common."""
    listed: list[Package] = []
    for version, cuda in packages.DRIVERS.items():
        listed += _driver(replace(compile_driver(version, cuda), mps=mps))
    listed += [packages.pinning_packages(branch, f"{branch}-1", f"{branch}.*") for branch in packages.BRANCHES]
    for release, version in packages.CUDA_TOOLKITS.items():
        listed += packages.cuda_packages(release, version)
    return [*listed, packages.cuda_package(), packages.foreign_package()]


def _packed(listed: list[Package]) -> list[tuple[Package, bytes]]:
    return [(package, pack(package)) for package in listed]


def _write_cuda(folder: Path, address: str, key: SigningKey, listed: list[tuple[Package, bytes]]) -> None:
    public = key.public()
    keyring = packages.keyring_package(address, folder.parent.name, public)
    fields = {"Origin": "NVIDIA", "Label": "NVIDIA CUDA", "Architecture": "x86_64", "Description": "simulated"}
    write_repository(folder, [(keyring, pack(keyring)), *listed], fields, key, now())
    (folder / "cuda-archive-keyring.gpg").write_bytes(public)


def _write_toolkit(folder: Path, address: str, key: SigningKey) -> None:
    listed = [package for version in packages.TOOLKITS for package in packages.toolkit_packages(version)]
    fields = {"Origin": "NVIDIA", "Label": "libnvidia-container", "Architectures": "amd64", "Description": "simulated"}
    write_repository(folder / "stable/deb/amd64", _packed(listed), fields, key, now())
    (folder / "gpgkey").write_bytes(key.public(armoured=True))
    (folder / "stable/deb/nvidia-container-toolkit.list").write_text(f"deb {address}/stable/deb/$(ARCH) /\n")


def forget_downloads(www: Path) -> None:
    """Packages keep their version when they are built anew: no host may take the old ones from the shared cache."""
    for package in www.rglob("*.deb"):
        (paths.debs() / package.name).unlink(missing_ok=True)


def now() -> int:
    """Now, or SOURCE_DATE_EPOCH. apt refuses a Release whose date lies in the future, not an old one."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))


def compile_driver(version: str, cuda: int) -> packages.Driver:
    """The libraries and programs of one driver version."""
    if shutil.which("gcc") is None:
        raise GpulabError("No C compiler for the simulated NVIDIA libraries", resolution="apt install gcc libc6-dev")
    with tempfile.TemporaryDirectory() as scratch:

        def built(sources: list[str], *flags: str) -> bytes:
            output = Path(scratch) / "output"
            defines = [f'-DDRIVER_VERSION="{version}"', f"-DCUDA_VERSION={cuda}"]
            defines += ["-include", str(packages.SOURCE / "older_glibc.h")]
            argv = ["gcc", "-O1", "-Wall", "-Wextra", "-s", *flags, *defines, "-o", str(output)]
            argv += [str(packages.SOURCE / name) for name in sources]
            done = subprocess.run(argv, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise GpulabError(f"`{' '.join(argv)}` ended with {done.returncode}", done.stderr.strip())
            return output.read_bytes()

        def library(name: str, source: str) -> bytes:
            return built([source, "gpu.c"], "-shared", "-fPIC", "-fvisibility=hidden", f"-Wl,-soname,{name}.so.1")

        return packages.Driver(
            version,
            nvml=library("libnvidia-ml", "nvml.c"),
            cuda=library("libcuda", "cuda.c"),
            smi=built(["smi.c"], "-ldl"),
            persistenced=built(["persistenced.c", "gpu.c"]),
        )

# SPDX-License-Identifier: MIT
"""The real Milvus server of `lab/milvus`, unpacked, in a network namespace of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from rehearsal import paths
from rehearsal.registry import recipe as common
from rehearsal.registry.milvus import entry, recipe

NETWORK = f"gpulab-milvus-{os.getpid()}"
START_S, STOP_S = 60, 120

Serve = Callable[[str], contextlib.AbstractContextManager[Path]]


def unpacked(pin: str, root: Path) -> Path:
    """A server's folder; the wheel stays in the cache."""
    wheels = paths.cache() / "registry/wheels"
    pattern = f"{pin.replace('==', '-')}-*.whl"
    if not list(wheels.glob(pattern)):
        common.download([pin], recipe.PYTHON, wheels, "--no-deps")
    for name, content in recipe.server_files(next(wheels.glob(pattern))).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(0o755)
    return root / "milvus"


@contextlib.contextmanager
def network(name: str = NETWORK) -> Iterator[list[str]]:
    """Words before a command that runs it where nothing but a loopback device is: Milvus binds wildcard addresses."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield ["ip", "netns", "exec", name]
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=True)


@contextlib.contextmanager
def serving(pin: str, folder: Path, loopback: list[str], settings: Mapping[str, Any]) -> Iterator[Path]:
    """A server of this version with `settings` as its user.yaml; gives its log."""
    configs = folder / "configs"
    configs.mkdir(exist_ok=True)
    (configs / "user.yaml").write_text(yaml.safe_dump(settings))
    words = [*loopback, sys.executable, entry.__file__, "--", "milvus", "run", "standalone"]
    program = unpacked(pin, folder / pin)
    for path in (program / "configs").iterdir():
        (configs / path.name).write_bytes(path.read_bytes())
    environment = {"PATH": f"{program}/bin:{os.environ['PATH']}", "MILVUSCONF": str(configs), "HOME": str(folder)}
    log = folder / "milvus.log"
    with open(log, "wb") as sink:
        process = subprocess.Popen(words, env=environment, cwd=folder, stdout=sink, stderr=sink)
    try:
        deadline = time.monotonic() + START_S
        healthy = [*loopback, "curl", "-sf", "-m1", "http://127.0.0.1:9091/healthz"]
        while subprocess.run(healthy, capture_output=True, check=False).returncode != 0:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield log
    finally:
        process.terminate()
        process.wait(timeout=STOP_S)

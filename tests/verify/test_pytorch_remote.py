# SPDX-License-Identifier: MIT
"""What verify's job sees of its environment, with a torch that is a stub and a package as pip installs them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from verify.containers import pytorch_remote

TORCH = """
__version__ = "2.13.0"
class version: cuda = None
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Where an environment has its packages: `stars`, of two files, one of which is too big to be read."""
    found = tmp_path / "environment/lib"
    (found / "stars").mkdir(parents=True)
    (found / "stars/__init__.py").write_text("x = 1")
    (found / "stars/big.so").write_bytes(bytes((pytorch_remote.WHOLE_MIB << 20) + 1))
    lines = []
    for path in sorted((found / "stars").iterdir()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
        lines.append(f"stars/{path.name},sha256={digest},{path.stat().st_size}")
    information = found / "stars-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: Stars\nVersion: 1.0\n")
    (information / "RECORD").write_text("\n".join([*lines, "stars-1.0.dist-info/RECORD,,", ""]))
    (tmp_path / "torch.py").write_text(TORCH)
    return found


def saw(site: Path) -> dict[str, Any]:
    top = site.parent.parent
    job = pytorch_remote.JOB.replace("/gpulab-verify", f"{top}/written")
    environment = {"PYTHONPATH": f"{site}:{top}", "VIRTUAL_ENV": str(site.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", job], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.removeprefix(pytorch_remote.MARK))
    return found


def test_environment_as_installed_has_no_changed_files(site: Path) -> None:
    found = saw(site)
    assert (found["changed"], found["own"]) == ([], ["stars"])
    assert (found["versions"]["stars"], found["torch"]) == ("1.0", "2.13.0")


#: A torch with CUDA whose device multiplies as it is told.
ON_A_DEVICE = """
__version__ = "2.13.0"
class version: cuda = "13.0"
class cuda:
    def device_count(): return 1
class Matrix:
    def __init__(self, rows): self.rows = rows
    def remainder(self, by): return Matrix([value % by for value in self.rows])
    def float(self): return self
    def repeat(self, count, _): return Matrix([list(self.rows)] * count)
    def cuda(self): return Matrix(self.rows)
    def cpu(self): return self
    @property
    def T(self): return self
    def __getitem__(self, index): return Matrix(self.rows[index])
    def __mul__(self, other): return Matrix([a * b for a, b in zip(self.rows, other.rows)])
    def sum(self): return sum(self.rows)
    def __matmul__(self, other): DEVICE
    def __eq__(self, value): return Matrix([[entry == value for entry in row] for row in self.rows])
    def all(self): return all(all(row) for row in self.rows)
def arange(count): return Matrix(list(range(count)))
"""
RIGHT = "return Matrix([[float(sum(x * x for x in self.rows[0]))] * 4] * 4)"


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (RIGHT, ""),
        ("return Matrix([[0.0] * 4] * 4)", "a wrong product"),
        ("raise RuntimeError('CUDA error: out of memory')", "CUDA error: out of memory"),
    ],
)
def test_job_computes_on_the_device(site: Path, device: str, said: str) -> None:
    (site.parent.parent / "torch.py").write_text(ON_A_DEVICE.replace("DEVICE", device))

    assert saw(site)["computed"] == said


def test_torch_without_cuda_computes_nothing(site: Path) -> None:
    assert saw(site)["computed"] is None


def test_files_that_are_not_their_packages_are_named(site: Path) -> None:
    (site / "stars/__init__.py").write_text("x = 2")
    assert saw(site)["changed"] == ["stars/__init__.py"]
    (site / "stars/__init__.py").unlink()
    (site / "stars/big.so").write_bytes(b"")
    assert saw(site)["changed"] == ["stars/__init__.py", "stars/big.so"]

# SPDX-License-Identifier: MIT
"""The programs that run on a guest: complete as sent, and right about what they read."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import operations
from operations.remote import program
from operations.system.remote import disk

PROGRAMS = sorted(Path(operations.__file__).parent.glob("*/remote/*.py"))


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def test_a_program_as_sent_is_complete(path: Path) -> None:
    """It names nothing that only the control machine has."""
    text = program(str(path.parent.parent / "facts.py"), path.stem)
    assert text.startswith(f"# gpulab: {path.parent.parent.name}/{path.stem}\n")
    code = compile(text, str(path), "exec")
    assert not [name for name in code.co_names if name.startswith("operations")]
    # Linux takes at most 128 KiB in one argument, and sshd's shell gets all of it as one, quoted again for sudo.
    sent = shlex.quote(f"python3 -c {shlex.quote(text)}")
    assert len(sent) < 100_000


def test_a_program_as_sent_runs(tmp_path: Path) -> None:
    text = program(str(Path(operations.__file__).parent / "system" / "facts.py"), "disk")
    argument = json.dumps({"by_id": str(tmp_path / "absent"), "mount": str(tmp_path)})
    done = subprocess.run([sys.executable, "-c", text, argument], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["device"] is None


def test_the_size_of_an_ext4_is_read_from_its_superblock(tmp_path: Path) -> None:
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(64 * 2**20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-b", "4096", str(image), "8192"], check=True)
    assert disk.ext4_size(str(image)) == 32 * 2**20

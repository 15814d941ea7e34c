# SPDX-License-Identifier: MIT
"""The first error of a DKMS build. The logs are of real builds against Debian 13's headers of kernel 6.12.118."""

from __future__ import annotations

from pathlib import Path

import pytest

from operations.nvidia.remote.driver import build_failure, candidates, last_change

LOGS = Path(__file__).parent.parent / "hosts" / "dkms"


@pytest.mark.parametrize(
    ("log", "file", "line", "error", "more"),
    [
        # 30 lines of other output around it, warnings of other files before.
        ("too-few-arguments", "nv-pci.c", 8, "too few arguments to function 'pci_resize_resource'", 0),
        (
            "gpl-only-symbol",
            "",
            0,
            "modpost: GPL-incompatible module nvidia.ko uses GPL-only symbol 'iommu_present'",
            2,
        ),
        ("no-compiler", "", 0, "gcc-11: not found", 0),
    ],
)
def test_the_first_error_of_a_real_build(log: str, file: str, line: int, error: str, more: int) -> None:
    assert build_failure((LOGS / f"{log}.txt").read_text()) == {
        "file": file,
        "line": line,
        "error": error,
        "more": more,
    }


@pytest.mark.parametrize(
    ("log", "file", "line", "error"),
    [
        # A column that an old compiler leaves out.
        ("/usr/src/linux-6.1/mm.h:31: error: x\n", "/usr/src/linux-6.1/mm.h", 31, "x"),
        ("inc/nv.h:5:10: fatal error: asm/x.h: No such file\n", "inc/nv.h", 5, "asm/x.h: No such file"),
        # The cause, not what make says of it.
        ("cp: nvidia.ko: No space left on device\nmake: *** [all] Error 1\n", "", 0, "No space left on device"),
        (
            "Error! Your kernel headers for kernel 6.12.48+deb13-amd64 cannot be found at /lib/modules/…/build\n",
            "",
            0,
            "Your kernel headers for kernel 6.12.48+deb13-amd64 cannot be found",
        ),
        ("make[1]: *** No rule to make target 'x'.\n", "", 0, "make[1]: *** No rule to make target 'x'."),
        ("anything\nelse\n\n", "", 0, "else"),
        ("", "", 0, "the log is empty"),
    ],
)
def test_other_ends_of_a_build(log: str, file: str, line: int, error: str) -> None:
    found = build_failure(log)
    assert (found["file"], found["line"], found["error"]) == (file, line, error)


HISTORY = """
Start-Date: 2026-11-20  06:12:01
Commandline: /usr/bin/unattended-upgrade
Upgrade: libcuda1:amd64 (580.95.05-1, 580.105.08-1), nvidia-driver-cuda:amd64 (580.95.05-1, 580.105.08-1)
End-Date: 2026-11-20  06:13:40

Start-Date: 2026-11-21  09:00:00
Commandline: apt-get install vim
Install: vim:amd64 (9.1)
End-Date: 2026-11-21  09:00:02
"""


def test_who_changed_the_driver_last() -> None:
    assert last_change(HISTORY, ["nvidia-driver-cuda"]) == "/usr/bin/unattended-upgrade"
    assert last_change(HISTORY, ["nvidia-kernel-open-dkms"]) == ""
    assert last_change("", ["vim"]) == ""


def test_what_apt_would_install_next() -> None:
    policy = """\
nvidia-driver-cuda:
  Installed: 580.95.05-1
  Candidate: 590.44.01-1
  Version table:
     590.44.01-1 1002
nvidia-kernel-open-dkms:
  Installed: (none)
  Candidate: (none)
"""
    assert candidates(policy) == {"nvidia-driver-cuda": "590.44.01-1", "nvidia-kernel-open-dkms": None}

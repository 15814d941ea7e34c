# SPDX-License-Identifier: MIT
"""Runs on the guest: its kernels, which of them have NVIDIA's module, and which one GRUB boots next."""

import glob
import os
import platform
import re
from typing import Any

from operations.remote.common import answer, packages, run, text

GRUB = "/boot/grub/grub.cfg"


def read(dropin: str) -> dict[str, Any]:
    """The installed kernels, the oldest first. `grub`: None where no GRUB boots this guest (a container)."""
    running = platform.release()
    images = {os.path.basename(path).removeprefix("vmlinuz-") for path in glob.glob("/boot/vmlinuz-*")}
    releases = sorted(images | {running}, key=order)
    headers = packages(["linux-headers-*"])
    status = run("dkms", "status")[1].splitlines()
    config = text(GRUB)
    return {
        "running": running,
        "kernels": [
            {
                "release": release,
                "headers": headers.get(f"linux-headers-{release}") is not None,
                "headers_exist": headers.get(f"linux-headers-{release}") is not None
                or bool(run("apt-cache", "show", f"linux-headers-{release}")[1].strip()),
                "module": run("modinfo", "-k", release, "-F", "version", "nvidia")[1].strip() or None,
            }
            for release in releases
        ],
        # What DKMS has sources of: `nvidia/580.95.05`.
        "source": next(
            (line.partition(",")[0].partition(":")[0] for line in status if line.startswith("nvidia")), None
        ),
        "grub": None if config is None else {"entries": entries(config), "default": default(config, grubenv())},
        "dropin": text(dropin),
    }


def order(release: str) -> list[tuple[int, int, str]]:
    """Kernel releases compare number by number: 6.9 is older than 6.12."""
    return [(1, int(word), "") if word.isdigit() else (0, 0, word) for word in re.findall(r"\d+|[^\d]+", release)]


def entries(config: str) -> list[dict[str, str]]:
    """The menu entries of a grub.cfg that boot a kernel: `path` (`submenu>entry`, by ids), its kernel's `release`.

    Recovery entries are left out: nothing boots them by default. The first entry is GRUB's default `0`.
    """
    found: list[dict[str, str]] = []
    submenu = ""
    for line in config.splitlines():
        words = line.strip()
        named = re.search(r"\$menuentry_id_option\s+'([^']+)'", words) or re.search(r"--id[= ]'?([^\s']+)'?", words)
        if words.startswith("submenu "):
            submenu = named[1] if named else ""
        elif words.startswith("menuentry "):
            identity = named[1] if named else ""
            found.append({"path": f"{submenu}>{identity}" if submenu else identity, "release": ""})
        elif line.startswith("}"):
            # A submenu's brace stands at the line's begin; those of its entries are indented.
            submenu = ""
        elif found and (kernel := re.match(r"linux(?:efi|16)?\s+\S*/vmlinuz-(\S+)", words)):
            found[-1]["release"] = kernel[1]
    return [entry for entry in found if entry["release"] and "-recovery-" not in entry["path"]]


def default(config: str, environment: dict[str, str]) -> str:
    """What grub.cfg sets as default when no entry was asked for once: a number, an id, or a path of ids."""
    if environment.get("next_entry"):
        return environment["next_entry"]
    said = [value for value in re.findall(r'set default="([^"]*)"', config) if value != "${next_entry}"]
    word = said[0] if said else "0"
    return environment.get("saved_entry") or "0" if word == "${saved_entry}" else word


def grubenv() -> dict[str, str]:
    lines = (text("/boot/grub/grubenv") or "").splitlines()
    return dict(line.partition("=")[::2] for line in lines if "=" in line and not line.startswith("#"))


if __name__ == "__main__":
    answer(read)

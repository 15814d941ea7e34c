# SPDX-License-Identifier: MIT
"""Reads on the guest what PyTorch jobs need: image, network, environments, folders, groups and files."""

import grp
import json
import os
import stat
from typing import Any

from operations.containers.remote.pytorch_environment import DESCRIPTION, state
from operations.remote.common import answer, files, run, text


def owner(path: str) -> list[Any] | None:
    """Uid, gid and mode of a folder, None where there is none."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return [found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)] if stat.S_ISDIR(found.st_mode) else None


def gid(name: str) -> int | None:
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def environments(folder: str) -> dict[str, Any]:
    """Every finished environment by name: the versions inside, and whether all of it is as it was made."""
    found = {}
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    for name in names:
        listed = text(f"{folder}/{name}/{DESCRIPTION}")
        if listed is None or name == "current" or name.startswith("."):
            continue
        try:
            described = json.loads(listed)
            found[name] = {"versions": described["versions"], "whole": described["state"] == state(f"{folder}/{name}")}
        except (ValueError, LookupError, TypeError):
            found[name] = {"versions": {}, "whole": False}
    return found


def read(image: str, network: str, data: str, mounted: str, paths: list[str], groups: list[str]) -> dict[str, Any]:
    home = f"{data}/pytorch"
    current = f"{home}/environments/current"
    return {
        "image": run("docker", "image", "inspect", "--format", "{{.Id}}", image)[0] == 0,
        "network": network in ("", "none")
        or run("docker", "network", "inspect", "--format", "{{.Id}}", network)[0] == 0,
        "mounted": os.path.ismount(mounted),
        "environments": environments(f"{home}/environments"),
        "current": os.readlink(current) if os.path.islink(current) else None,
        "groups": {name: gid(name) for name in groups},
        "folders": {name: owner(f"{home}/tenants/{name.removeprefix('gpulab-')}") for name in groups},
        "logs": {name: owner(f"/var/log/gpulab/jobs/{name.removeprefix('gpulab-')}") for name in groups},
        "files": files(paths),
    }


if __name__ == "__main__":
    answer(read)

# SPDX-License-Identifier: MIT
"""The data disk: formatted once, when nothing at all lies on it, and mounted by its UUID ever after."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import files, step
from operations.plan import file_diff
from operations.system.facts import DataDisk

#: The file system's label, by which a data disk of ours is known.
LABEL = "gpulab-data"

#: mount(8) and systemd ignore options that begin with `x-`; this one marks the line of fstab as ours.
MARK = "x-gpulab"

#: A boot does not wait longer than this many seconds for a disk that is gone, and goes on without it (`nofail`).
DEVICE_TIMEOUT_S = 15

#: ext4 grows in block groups of 128 MiB; less than two of them are not worth a change.
GROWTH = 256 * 2**20

# Asked again in the same breath as the disk is formatted.
_FORMAT = """
set -e
seen=$(wipefs --no-act --noheadings "$1")
if [ -n "$seen" ]; then echo "$1 is not empty: $seen" >&2; exit 1; fi
mkfs.ext4 -q -m 0 -L "$2" -U "$3" "$1"
"""


# The mount point on the system disk, beneath whatever is mounted on it: empty, and nothing can be made in it. Where the
# file system has no such flag, verify says so.
_PROTECT = """
exec unshare --mount sh -ec '
mkdir -p "$1/$2"
mount --bind "$1" /mnt
lsattr -d "/mnt/$2" >/dev/null 2>&1 || exit 0
seen=$(ls -A "/mnt/$2")
if [ -n "$seen" ]; then echo "$1/$2 is not empty: $seen" >&2; exit 1; fi
chattr +i "/mnt/$2"
' protect "$1" "$2"
"""


@dataclass(frozen=True)
class Actions:
    """What has to happen. `fstab`: the file's new text, None when it is right; `protect`: the mount point beneath."""

    uuid: str
    device: str
    format: bool = False
    protect: bool = False
    fstab: str | None = None
    mount: bool = False
    grow: bool = False

    def any(self) -> bool:
        return self.format or self.protect or self.mount or self.grow or self.fstab is not None


def fstab_line(identity: str, mount: str) -> str:
    """The line that mounts the file system of UUID `identity`."""
    # A device that goes takes its mount along, and that the services.
    options = f"defaults,nofail,x-systemd.device-timeout={DEVICE_TIMEOUT_S}s,x-systemd.device-bound,{MARK}"
    return f"UUID={identity} {mount} ext4 {options} 0 2"


def fstab_with(text: str, identity: str, mount: str) -> str:
    """fstab with our line for `mount`, and no other line of ours.

    Raises:
        GpulabError: a line that is not ours has the mount point.
    """
    kept = []
    for line in text.splitlines():
        fields = line.split()
        if not line.lstrip().startswith("#") and len(fields) >= 4:
            if MARK in fields[3].split(","):
                continue
            if fields[1].rstrip("/") == mount.rstrip("/"):
                raise GpulabError(
                    f"{mount}: /etc/fstab already has a line for it that is not ours",
                    f"  {line}",
                    "remove the line, or choose another data_disk.mount",
                )
        kept.append(line)
    return "\n".join([*kept, fstab_line(identity, mount)]) + "\n"


def decide(found: Mapping[str, Any], by_id: str, mount: str) -> Actions:
    """What has to happen to the disk of a `DataDisk` fact; a guest that does not exist yet has an empty disk.

    Raises:
        GpulabError: the disk is missing, holds something that is not ours, or the mount point is taken.
    """
    if not found:
        return Actions("", by_id, format=True, protect=True, fstab=fstab_with("", "", mount), mount=True)
    device = found["device"]
    if device is None:
        raise GpulabError(
            f"{by_id}: no such disk in the guest",
            f"Expected the data disk of the VM; seen: {', '.join(found['known']) or 'no disk by id'}",
            "look at scsi1 in the VM's configuration; a disk that was just added needs a restart of the guest",
        )
    _refuse_foreign(found, device)
    mounted = found["mounted"]
    if mounted is not None and mounted["number"] != found["number"]:
        raise GpulabError(
            f"{mount}: another device is mounted there: {mounted['source']} ({mounted['type']})",
            f"Expected {device}, the data disk.",
            f"umount {mount}, or choose another data_disk.mount",
        )
    point = found["mount_point"]
    if point is not None and point["entries"]:
        _refuse_hidden(mount, point["entries"], mounted is not None)
    format_it = not found["signatures"]
    # A UUID of our own making: fstab can be planned before the file system is there.
    identity = str(uuid.uuid5(uuid.UUID(found["boot_id"]), by_id)) if format_it else found["signatures"][0]["uuid"]
    fstab = fstab_with(found["fstab"], identity, mount)
    return Actions(
        identity,
        device,
        format=format_it,
        protect=point is None or point["immutable"] is False,
        fstab=None if fstab_line(identity, mount) in found["fstab"].splitlines() else fstab,
        mount=mounted is None,
        grow=not format_it and found["size"] - found["filesystem_size"] >= GROWTH,
    )


def _refuse_hidden(mount: str, entries: Sequence[str], mounted: bool) -> None:
    """
    Raises:
        GpulabError: always; something lies on the system disk where the data disk is, or is to be, mounted.
    """
    seen = f"Seen on the system disk: {', '.join(entries)}"
    if not mounted:
        raise GpulabError(
            f"{mount} is not empty, and mounting the data disk would hide what is in it",
            seen,
            f"move it away, deploy, and move it back into {mount}",
        )
    parent, _, name = mount.rstrip("/").rpartition("/")
    raise GpulabError(
        f"{mount}: the data disk hides files of the system disk, which services would find without it",
        seen,
        f"mount --bind {parent or '/'} /mnt, move what is in /mnt/{name} away, umount /mnt, deploy again",
    )


def _refuse_foreign(found: Mapping[str, Any], device: str) -> None:
    """
    Raises:
        GpulabError: the disk can't be read, or anything but an ext4 file system with our label is on it.
    """
    if found["error"] or not found["size"]:
        raise GpulabError(f"{device}: can't be read as a disk", found["error"] or "It has no size.")
    if found["read_only"]:
        raise GpulabError(f"{device}: the data disk is read-only")
    seen = [f"{item['type']}" + (f" {item['label']!r}" if item.get("label") else "") for item in found["signatures"]]
    seen += [f"partition {name}" for name in found["partitions"]] + [f"in use by {name}" for name in found["holders"]]
    if not seen:
        return
    only = found["signatures"][0] if len(seen) == len(found["signatures"]) == 1 else {}
    if only.get("type") == "ext4" and only.get("label") == LABEL:
        return
    foreign = only.get("type") == "ext4"
    raise GpulabError(
        f"{device}: the data disk holds something that is not ours: {', '.join(dict.fromkeys(seen))}",
        f"Expected an empty disk, or ext4 labelled {LABEL!r}. Nothing on it was touched.",
        f"to keep its content: e2label {device} {LABEL}" if foreign else f"to give it up: wipefs --all {device}",
    )


@step.step
def data_disk(by_id: str, mount: str) -> step.Commands:
    """
    Ensure that the data disk is mounted, now and at each boot.

    **Data**: a disk is formatted only when it carries no signature of any kind. Whatever else is found on it is
    named and refused. A disk that has grown gets its file system grown, while mounted.

    **Without it** nothing can be written in its place: the mount point on the system disk is empty and immutable.

    + by_id: path of the disk under `/dev/disk/by-id`
    + mount: mount point; its folder is made
    """
    found = step.read(DataDisk, by_id=by_id, mount=mount)
    actions = decide(found, by_id, mount)
    if not actions.any():
        step.noop(f"{mount} is on {found['device']}")
        return
    if actions.format:
        step.changes(f"format {actions.device} (it is empty)", (f"ext4, label {LABEL}",))
    if actions.fstab is not None:
        lines = file_diff(found.get("fstab"), actions.fstab)
        # Before the disk exists there is neither a UUID nor the rest of the file to show.
        step.changes("file /etc/fstab", lines if found else (f"+{fstab_line('(of the new disk)', mount)}",))
    if actions.protect:
        step.changes(f"make the mount point {mount} on the system disk immutable")
    if actions.mount:
        step.changes(f"mount {actions.device} at {mount}")
    if actions.grow:
        step.changes(f"grow the file system of {actions.device} to {found['size'] // 2**30} GiB")

    device = QuoteString(actions.device)
    if actions.format:
        script = QuoteString(_FORMAT.strip())
        yield StringCommand("sh", "-c", script, "format", device, LABEL, QuoteString(actions.uuid))
    if actions.fstab is not None:
        yield files.write({"/etc/fstab": files.File(actions.fstab)})
        yield StringCommand("systemctl", "daemon-reload")
    if actions.protect:
        parent, _, name = mount.rstrip("/").rpartition("/")
        script = QuoteString(_PROTECT.strip())
        yield StringCommand("sh", "-c", script, "protect", QuoteString(parent or "/"), QuoteString(name))
    if actions.mount:
        # By device: the link of a new UUID needs udev's time to appear.
        yield StringCommand("mount", "-t", "ext4", device, QuoteString(mount))
    if actions.grow:
        yield StringCommand("resize2fs", device)

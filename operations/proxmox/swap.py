# SPDX-License-Identifier: MIT
"""What a VM's configuration says of its rebuild, and what comes next. Pure.

All that a run knows of an earlier one, a killed one included, stands in the VM itself: which volume lies where, and
one line of its description. PVE gives freed volume names and `unusedN` numbers away again, so neither a key nor the
line is believed alone: volume ids and sizes are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from inventory import Guest, Node
from operations.proxmox import config as declared
from operations.proxmox.vm_state import VmState

#: The drive with the system disk, and the one that an orphan is attached to, since only a drive's volume can be freed.
SYSTEM, ADOPTED = "scsi0", "scsi30"
#: The line of the VM's description that is ours begins so.
WORD = declared.MARKER
DRIVE = re.compile(r"^(scsi|virtio|sata|ide)[0-9]+$")
UNUSED = re.compile(r"^unused[0-9]+$")
GIB = 2**30


class Stage(Enum):
    """How far a rebuild has come, read from the VM alone."""

    IDLE = "no rebuild has begun"
    BEFORE = "before the swap"
    SWAPPED = "swapped"
    VERIFIED = "verified"
    DELETED = "old deleted"


class Next(Enum):
    """What has to be done next. The steps of rebuild.py stand in this order."""

    CREATE = "create the VM"
    STOP = "shut the VM down"
    MARK = "note in the VM what is about to happen"
    CLEAN = "remove what a cut-off rebuild left"
    IMPORT = "import the new system disk"
    PREPARE = "size the new disk, make cloud-init's drive anew"
    DEPLOY = "deploy and verify"
    PUT_BACK = "put the old system disk back"
    START = "start the old system"


@dataclass(frozen=True)
class Marker:
    """Our line of the description. `waste`: `volume@bytes` of what may be freed; `kept`: unnamed volumes of others."""

    old: str = ""
    run: str = ""
    bytes: int = 0
    #: The old drive's options, with which it goes back.
    options: str = ""
    #: The VM's identity when the rebuild began: see `identity()`.
    uuid: str = ""
    mac: str = ""
    data: str = ""
    kept: tuple[str, ...] = ()
    waste: tuple[str, ...] = ()
    #: Seconds since the epoch: when verify passed, and until when the old disk stays.
    verified: int = 0
    until: int = 0
    #: `destroy=1`: the keeper VM's id, the backup that was taken, and, once the VM is made anew, when (as above).
    keeper: int = 0
    archive: str = ""
    made: int = 0

    def line(self) -> str:
        return written(WORD, self)


Line = TypeVar("Line")


def written(word: str, values: Any) -> str:
    """A line of a description: `word` and each field that says something."""
    words = [word]
    for item in fields(values):
        value = getattr(values, item.name)
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        if value:
            words.append(f"{item.name}={text}")
    return " ".join(words)


def read_line(kind: type[Line], word: str, config: Mapping[str, Any]) -> Line | None:
    """What `written()` wrote into a description; None when no line begins with `word`."""
    for line in str(config.get("description", "")).splitlines():
        first, _, rest = line.strip().partition(" ")
        if first != word:
            continue
        texts = dict(pair.partition("=")[::2] for pair in rest.split())
        values: dict[str, Any] = {}
        for item in fields(kind):  # type: ignore[arg-type]
            text = texts.get(item.name, "")
            if isinstance(item.default, tuple):
                values[item.name] = tuple(filter(None, text.split(",")))
            elif isinstance(item.default, int):
                values[item.name] = int(text) if text.isdigit() else 0
            else:
                values[item.name] = text
        return kind(**values)
    return None


def marker(config: Mapping[str, Any]) -> Marker | None:
    """Our line of a VM's description; None when there is none."""
    return read_line(Marker, WORD, config)


def holder(mark: Marker | None) -> str:
    """The run in whose middle the VM is; empty when none has begun."""
    return mark.run if mark is not None and (mark.old or mark.keeper) else ""


def described(config: Mapping[str, Any], mark: Marker | None) -> str:
    """The VM's description with our line, or without it."""
    return with_line(config, WORD, mark.line() if mark else None)


def with_line(config: Mapping[str, Any], word: str, line: str | None) -> str:
    """The description with this line in place of the one that begins with `word`; all others stay as they are."""
    lines = str(config.get("description", "")).splitlines()
    others = [known for known in lines if known.strip().partition(" ")[0] != word]
    return "\n".join([*others, line] if line else others)


def volume(value: object) -> str:
    """The volume id of a drive's value."""
    return str(value).partition(",")[0].removeprefix("file=")


def drives(config: Mapping[str, Any]) -> dict[str, str]:
    """The disks that the VM sees: key to volume id. CD-ROMs and cloud-init's drive are none."""
    return {
        key: volume(value)
        for key, value in config.items()
        if DRIVE.match(key) and "media=cdrom" not in str(value).split(",") and ":" in volume(value)
    }


def unused(config: Mapping[str, Any]) -> dict[str, str]:
    """The volumes that PVE keeps for the VM without showing them to it: key to volume id."""
    return {key: volume(value) for key, value in config.items() if UNUSED.match(key)}


def data_disks(config: Mapping[str, Any]) -> dict[str, str]:
    """Every disk but the system's (and an adopted orphan): what no path of a rebuild may touch."""
    return {key: volid for key, volid in sorted(drives(config).items()) if key not in (SYSTEM, ADOPTED)}


def identity(config: Mapping[str, Any]) -> dict[str, str]:
    """What makes the VM this VM to the world: SMBIOS UUID, MAC addresses, data disks by volume id."""
    uuid = re.search(r"(?:^|,)uuid=([0-9a-fA-F-]+)", str(config.get("smbios1", "")))
    macs = {
        key: found[1].lower()
        for key, value in sorted(config.items())
        if re.match(r"^net[0-9]+$", key) and (found := re.search(r"=([0-9A-Fa-f:]{17})(?:,|$)", str(value)))
    }
    return {
        "uuid": uuid[1].lower() if uuid else "",
        "mac": pairs(macs),
        "data": pairs(data_disks(config)),
    }


def pairs(mapping: Mapping[str, str]) -> str:
    """A mapping in one field of our line."""
    return ",".join(f"{key}={value}" for key, value in mapping.items())


def stage(config: Mapping[str, Any], sizes: Mapping[str, int] | None = None) -> Stage:
    """How far the rebuild of this VM has come. `sizes`: bytes of its volumes, where they are known.

    An `unusedN` with the old disk's name and another size is a new volume under a freed name: the old one is gone.
    """
    mark = marker(config)
    if mark is None or not mark.old:
        return Stage.IDLE
    if drives(config).get(SYSTEM) == mark.old:
        return Stage.BEFORE
    known = (sizes or {}).get(mark.old, mark.bytes)
    in_a_drive = mark.old in drives(config).values()
    if in_a_drive or mark.old not in unused(config).values() or (mark.bytes and known != mark.bytes):
        return Stage.DELETED
    return Stage.VERIFIED if mark.verified else Stage.SWAPPED


def orphans(config: Mapping[str, Any], sizes: Mapping[str, int], storage: str, vmid: int) -> list[str]:
    """Disks of this VM on `storage` that its configuration does not name: what a killed import leaves."""
    named = {volume(value) for value in config.values()}
    ours = re.compile(rf"^{re.escape(storage)}:(?:{vmid}/)?vm-{vmid}-disk-[0-9]+(?:\.[a-z0-9]+)?$")
    return sorted(volid for volid in sizes if volid not in named and ours.match(volid))


def leftovers(config: Mapping[str, Any], sizes: Mapping[str, int], storage: str, vmid: int) -> list[str]:
    """What an earlier rebuild left and may be freed now: volumes it noted as waste, and its orphans.

    Never the system disk, the old one, a data disk, or an orphan that was there before the rebuild began.
    """
    mark = marker(config)
    if mark is None:
        return []
    noted = []
    for entry in mark.waste:
        volid, _, size = entry.rpartition("@")
        if sizes.get(volid) == int(size or 0):
            noted.append(volid)
    found = [*noted, *(orphans(config, sizes, storage, vmid) if mark.old else [])]
    safe = {drives(config).get(SYSTEM), mark.old, *data_disks(config).values(), *mark.kept}
    safe |= set(mapping(mark.data).values())
    return [volid for volid in dict.fromkeys(found) if volid not in safe]


def next_step(
    config: Mapping[str, Any] | None, running: bool, run: str, waste: Iterable[str] = (), rollback: bool = False
) -> Next:
    """What this run has to do next. `waste`: `leftovers()`. `config` None: there is no VM."""
    if config is None:
        return Next.CREATE
    mark, now = marker(config), stage(config)
    taken = mark is not None and mark.run == run
    if rollback:
        if now in (Stage.SWAPPED, Stage.VERIFIED):
            if running:
                return Next.STOP
            named = [entry.rpartition("@")[0] for entry in mark.waste] if mark else []
            return Next.PUT_BACK if taken and drives(config).get(SYSTEM) in [None, *named] else Next.MARK
        return Next.START
    if now in (Stage.IDLE, Stage.BEFORE):
        if running:
            return Next.STOP
        if now is Stage.IDLE or not taken:
            return Next.MARK
        # Noted waste that is gone goes from the note, too: the import may be given the freed name.
        return Next.CLEAN if list(waste) or (mark and mark.waste) else Next.IMPORT
    if not taken:
        return Next.MARK
    return Next.DEPLOY if running or now is Stage.DELETED else Next.PREPARE


@dataclass(frozen=True)
class Subject:
    """A VM and what a rebuild needs to know about its surroundings. `sizes`: bytes of each of its volumes."""

    vm: VmState
    pending: tuple[str, ...] = ()
    snapshots: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    free: int = 0
    image: bool = True

    @property
    def config(self) -> Mapping[str, Any]:
        return self.vm.config

    @property
    def stage(self) -> Stage:
        return stage(self.vm.config, self.sizes)

    @property
    def running(self) -> bool:
        return self.vm.status == "running"


def problems(subject: Subject, guest: Guest, node: Node) -> list[str]:
    """Why the VM cannot be rebuilt now; empty when it can."""
    config, found = subject.config, []
    if subject.vm.lock:
        found.append(f"it is locked ({subject.vm.lock})")
    if subject.stage is Stage.DELETED:
        return found
    if SYSTEM not in drives(config):
        found.append(f"it has no system disk on {SYSTEM}")
    if subject.stage in (Stage.SWAPPED, Stage.VERIFIED):
        return found + changed_identity(config)
    found += unready(subject, guest, node)
    # What an earlier rebuild left is freed before the import.
    waste = leftovers(config, subject.sizes, guest.disk_storage, guest.vmid)
    free = subject.free + sum(subject.sizes[volid] for volid in waste)
    if free < guest.system_disk_gib * GIB:
        found.append(
            f"storage {guest.disk_storage} has {free / GIB:.0f} GiB left; "
            f"a second system disk needs {guest.system_disk_gib} GiB"
        )
    return found


def unready(subject: Subject, guest: Guest, node: Node) -> list[str]:
    """What keeps any rebuild from beginning."""
    found = []
    if subject.pending:
        found.append(f"it has pending changes ({', '.join(subject.pending)}); restart it or revert them first")
    if subject.snapshots:
        found.append(f"it has snapshots ({', '.join(subject.snapshots)}); delete them first")
    if not subject.image:
        found.append(f"the image {declared.image_volume(guest, node)} is not on the node")
    return found + _unclear_disks(subject.config, subject.sizes)


def _unclear_disks(config: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Disks that cannot be told apart by their volume ids, so that nobody could say which one holds data."""
    disks, found = drives(config), []
    if not data_disks(config):
        found.append("it has no data disk; expected one on scsi1")
    for key, volid in sorted(disks.items()):
        if volid not in sizes:
            found.append(
                f"{key} is {volid}, which its storage does not list as a disk of this VM; "
                "the token may lack Datastore.Audit there"
            )
        if list(disks.values()).count(volid) > 1:
            found.append(f"{key} is {volid}, which is on another drive too")
    if ADOPTED in disks and not _noted(config, disks[ADOPTED]):
        found.append(f"{ADOPTED} is in use ({disks[ADOPTED]}); a rebuild needs it free")
    return found


def _noted(config: Mapping[str, Any], volid: str) -> bool:
    """Is this volume noted as waste?"""
    mark = marker(config)
    return mark is not None and volid in [entry.rpartition("@")[0] for entry in mark.waste]


def changed_identity(config: Mapping[str, Any]) -> list[str]:
    """How the VM differs from the one whose rebuild began. Disks and network cards that it gained are no difference."""
    mark = marker(config)
    if mark is None or not mark.old:
        return []
    now = identity(config)
    found = [] if mark.uuid == now["uuid"] else [f"its SMBIOS UUID was {mark.uuid}, it is {now['uuid'] or 'gone'}"]
    cards, disks = mapping(now["mac"]), mapping(now["data"])
    found += [
        f"the MAC address of {key} was {mac}, it is {cards[key]}"
        for key, mac in mapping(mark.mac).items()
        if cards.get(key, mac) != mac
    ]
    found += [
        f"the data disk on {key} was {volid}, it is {disks.get(key, 'gone')}"
        for key, volid in mapping(mark.data).items()
        if disks.get(key) != volid
    ]
    return found


def mapping(text: str) -> dict[str, str]:
    """What `pairs()` wrote."""
    return dict(pair.partition("=")[::2] for pair in text.split(",") if pair)


def new_disk(config: Mapping[str, Any], guest: Guest, node: Node) -> str:
    """The value of `scsi0` that imports the image; options of the old drive that nobody declares stay."""
    value = declared.volumes(guest, node)[SYSTEM]
    names = {part.partition("=")[0] for part in value.split(",")[1:]}
    return ",".join([value, *(part for part in _options(config) if part.partition("=")[0] not in names)])


def _options(config: Mapping[str, Any]) -> list[str]:
    """The system drive's options, without what PVE states about its volume."""
    parts = str(config.get(SYSTEM, "")).split(",")[1:]
    return [part for part in parts if part.partition("=")[0] not in ("size", "format", "import-from")]


def first_mark(subject: Subject, guest: Guest, run: str) -> Marker:
    """The marker that a rebuild begins with. Waste of an earlier rollback is carried over while it lies idle."""
    config, sizes = subject.config, subject.sizes
    old, now = drives(config)[SYSTEM], identity(config)
    before = marker(config)
    unnamed = orphans(config, sizes, guest.disk_storage, guest.vmid)
    idle = {f"{volid}@{sizes.get(volid, 0)}" for volid in (*unused(config).values(), *unnamed)}
    waste = tuple(entry for entry in (before.waste if before else ()) if entry in idle)
    return Marker(
        old=old,
        run=run,
        bytes=sizes[old],
        options=",".join(_options(config)),
        kept=tuple(volid for volid in unnamed if f"{volid}@{sizes[volid]}" not in waste),
        waste=waste,
        uuid=now["uuid"],
        mac=now["mac"],
        data=now["data"],
    )


def taken_over(mark: Marker, config: Mapping[str, Any], run: str) -> Marker:
    """The marker of a run that goes on where another one died."""
    if mark.run == run or stage(config) is not Stage.BEFORE:
        return replace(mark, run=run)
    # Nothing has been swapped: the VM as it is now is the one to keep.
    now = identity(config)
    return replace(mark, run=run, uuid=now["uuid"], mac=now["mac"], data=now["data"])


def going_back(mark: Marker, config: Mapping[str, Any], sizes: Mapping[str, int]) -> Marker:
    """The marker with the new disk noted as waste: once the old one is back, nothing else tells which it was."""
    new = drives(config).get(SYSTEM)
    if new is None or new == mark.old:
        return mark
    return replace(mark, waste=tuple(dict.fromkeys([*mark.waste, f"{new}@{sizes.get(new, 0)}"])))


def without_old(mark: Marker, waste: Iterable[str] = ()) -> Marker | None:
    """The marker of a VM whose rebuild has ended; None where nothing is left to remove. `waste`: more of it."""
    left = tuple(dict.fromkeys([*mark.waste, *waste]))
    return Marker(run=mark.run, waste=left) if left else None

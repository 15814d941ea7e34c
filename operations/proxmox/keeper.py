# SPDX-License-Identifier: MIT
"""`destroy=1`: what the VM, its keeper and the volumes of both say, and what comes next. Pure.

A keeper is a VM that never runs and holds a guest's data disks while the guest's VM is deleted and made anew. As in
operations/proxmox/swap.py, all that a run knows of an earlier one stands in the VMs: a line of each description, and
which volume lies where. A disk that moves is renamed first and written into the configurations then, so it can lie
with either VM under a name that neither configuration knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from inventory import Guest, Node
from operations.proxmox import config as declared
from operations.proxmox.swap import (
    GIB,
    SYSTEM,
    Marker,
    Stage,
    Subject,
    data_disks,
    drives,
    identity,
    mapping,
    marker,
    pairs,
    read_line,
    unready,
    unused,
    volume,
    with_line,
    written,
)

#: The keeper's tag beside ours, and the first word of the line in its description.
TAG = WORD = "gpulab-keeper"
#: MiB: PVE's least. It never runs.
MEMORY_MIB = 16
#: What making, filling and deleting a keeper takes, on its own path.
RIGHTS = ("VM.Allocate", "VM.Audit", "VM.Config.Disk", "VM.Config.Memory", "VM.Config.Options")
#: Drives of any kind that can hold a volume, firmware and TPM included.
_HOLDS = re.compile(r"^(scsi|virtio|sata|ide|efidisk|tpmstate|unused)[0-9]+$")


class Next(Enum):
    """What has to be done next. The steps of rebuild.py stand in this order."""

    STOP = "shut the VM down"
    MARK = "note in the VM what is about to happen"
    BACK_UP = "back the VM up"
    KEEP = "make the keeper VM"
    MOVE_AWAY = "move the data disks to the keeper"
    DELETE = "delete the VM"
    CREATE = "create the VM without a data disk"
    MOVE_BACK = "move the data disks back"
    REMOVE = "delete the empty keeper"
    DEPLOY = "deploy and verify"


@dataclass(frozen=True)
class Note:
    """Our line of the keeper's description: whose keeper it is, and all of the old VM that the new one needs."""

    guest: str = ""
    vmid: int = 0
    run: str = ""
    #: The old VM's generation id, which PVE makes anew for each VM: it tells the old VM from the new one.
    genid: str = ""
    uuid: str = ""
    mac: str = ""
    #: The data disks as they were when they were last seen at rest: `scsi1=volume@bytes`.
    data: str = ""
    #: Their drives' options: `scsi1=discard=on;ssd=1`. A move that is killed can leave a disk that no drive names.
    options: str = ""
    #: Volumes of both VMs that no configuration named before the next disk was moved: none of them is that disk.
    kept: tuple[str, ...] = ()
    archive: str = ""

    def line(self) -> str:
        return written(WORD, self)

    @property
    def disks(self) -> dict[str, tuple[str, int]]:
        """Key to volume and bytes of each data disk."""
        parts = {key: value.rpartition("@") for key, value in mapping(self.data).items()}
        return {key: (volid, int(size or 0)) for key, (volid, _, size) in parts.items()}


def note(config: Mapping[str, Any]) -> Note | None:
    """Our line of a keeper's description; None when there is none."""
    return read_line(Note, WORD, config)


def described(config: Mapping[str, Any], wanted: Note) -> str:
    """The keeper's description with our line; all other lines stay as they are."""
    return with_line(config, WORD, wanted.line())


def name(guest: Guest) -> str:
    return f"{guest.name}-keeper"


def looks_like(guest: Guest, entry: Mapping[str, Any]) -> bool:
    """Does a VM of the node's list, or a configuration, have a keeper's name and tags?"""
    tags = set(re.split(r"[;, ]+", str(entry.get("tags", ""))))
    return {declared.TAG, TAG} <= tags and entry.get("name") == name(guest)


def is_keeper_of(guest: Guest, config: Mapping[str, Any]) -> bool:
    """Is it gpulab's keeper of this guest? Another lab may have a guest of the same name, not the same id."""
    found = note(config)
    return looks_like(guest, config) and found is not None and found.vmid == guest.vmid


def holds(config: Mapping[str, Any]) -> dict[str, str]:
    """Every volume that a configuration names, shown to the VM or not: key to volume id."""
    return {key: volume(value) for key, value in sorted(config.items()) if _HOLDS.match(key) and ":" in volume(value)}


def unnamed(configs: Iterable[Mapping[str, Any] | None], sizes: Mapping[str, int]) -> list[str]:
    """Volumes of the two VMs that neither configuration names."""
    named = {volume(value) for config in configs for value in (config or {}).values()}
    return sorted(volid for volid in sizes if volid not in named)


@dataclass(frozen=True)
class Situation:
    """The VM and its keeper. `vm` None: there is none, or no more than a cut-off task left; `keeper` None: none.

    `sizes`: bytes of the volumes of both ids. `keeper_id`: the keeper's, or the one that it will get.
    """

    vm: Mapping[str, Any] | None = None
    running: bool = False
    keeper: Mapping[str, Any] | None = None
    keeper_id: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    #: Is the VM with that id what a cut-off task of ours left of a keeper?
    debris: bool = False

    @property
    def mark(self) -> Marker | None:
        return marker(self.vm) if self.vm is not None else None

    @property
    def note(self) -> Note | None:
        return note(self.keeper) if self.keeper is not None else None

    @property
    def whole(self) -> bool:
        """Has the VM all that it had, so that nothing has been moved or deleted yet?"""
        if self.vm is None or self.made or holds(self.keeper or {}):
            return False
        named = data_disks(self.vm)
        return all(key in named and named[key] in self.sizes for key in (self.note.disks if self.note else named))

    @property
    def made(self) -> bool:
        """Is the VM the new one? An empty keeper of an earlier time says nothing about it."""
        if self.vm is None:
            return False
        if self.mark is not None and self.mark.made:
            return True
        noted = self.note
        other = noted is not None and noted.genid != _genid(self.vm)
        return other and bool(holds(self.keeper or {}))

    @property
    def deleted(self) -> bool:
        """Is the old VM gone, so that there is no way back?"""
        return self.made or (self.vm is None and self.note is not None)

    @property
    def unnamed(self) -> list[str]:
        return unnamed((self.vm, self.keeper), self.sizes)


def next_step(now: Situation, run: str, backup: bool = False) -> Next:
    """What this run has to do next. `backup`: one is declared."""
    mark, noted = now.mark, now.note
    ours = noted is None or noted.run == run
    if now.vm is None:
        if noted is None:
            return Next.DEPLOY
        return Next.CREATE if ours else Next.MARK
    if now.made:
        back = noted is not None and not at_rest(now.vm, now.keeper or {}, noted, now.sizes)
        if back and now.running:
            return Next.STOP
        if mark is None or mark.run != run or not mark.made or not ours:
            return Next.MARK
        if noted is None:
            return Next.REMOVE if now.debris else Next.DEPLOY
        return Next.MOVE_BACK if back else Next.REMOVE
    if now.running:
        return Next.STOP
    if mark is None or mark.keeper != now.keeper_id or mark.run != run or not ours:
        return Next.MARK
    if backup and not mark.archive and now.whole:
        return Next.BACK_UP
    if noted is None:
        return Next.KEEP
    return Next.DELETE if at_rest(now.keeper or {}, now.vm, noted, now.sizes) else Next.MOVE_AWAY


def at_rest(target: Mapping[str, Any], source: Mapping[str, Any], noted: Note, sizes: Mapping[str, int]) -> bool:
    """Does `target` hold every data disk, and `source` none and no trace of one?"""
    return (
        not missing(target, noted, sizes)
        and not data_disks(source)
        and not [volid for volid in unused(source).values() if volid not in sizes]
    )


def missing(config: Mapping[str, Any], noted: Note, sizes: Mapping[str, int]) -> list[str]:
    """The noted data disks that this VM does not hold, a line for each. One may have grown."""
    found = []
    for key, (volid, size) in noted.disks.items():
        here = drives(config).get(key)
        if here is None:
            found.append(f"{key}, which was {volid} ({_gib(size)}), is not there")
        elif sizes.get(here, -1) < size:
            seen = f"has {_gib(sizes[here])}" if here in sizes else "is not listed by its storage"
            found.append(f"{key} is {here}, which {seen}; it was {volid} ({_gib(size)})")
    return found


# One disk from one VM to the other.


class Act(Enum):
    DONE = "nothing is left to do"
    MOVE = "move it"
    ATTACH = "attach the volume that a killed move had renamed already"
    DROP = "remove the key whose volume has gone to the other VM"


@dataclass(frozen=True)
class Move:
    """What has to be done for one disk; `key` and `volid` say with what."""

    act: Act
    key: str = ""
    volid: str = ""


def move(
    key: str,
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    noted: Note,
    sizes: Mapping[str, int],
    target_id: int,
) -> Move:
    """What comes next for the disk on `key`, which it has with both VMs.

    A key is only removed when its volume is listed by no storage while the same disk is with the other VM, on a
    storage whose list is seen: its removal can free nothing.

    Raises:
        ValueError: it cannot be said which volume is the disk.
    """
    here, there = drives(source).get(key), drives(target).get(key)
    volid, size = noted.disks.get(key, ("", 0))
    if here is not None and here in sizes:
        if there is not None:
            raise ValueError(f"{key} is {here} with one VM and {there} with the other")
        return Move(Act.MOVE, key, here)
    if there is None:
        # The volume is renamed first, then it goes from one configuration and comes into the other.
        renamed = _of(target_id)
        storage = (here or volid).partition(":")[0]
        free = [
            each
            for each in unnamed((source, target), sizes)
            if renamed.search(each) and each not in noted.kept and sizes[each] == size
            if each.partition(":")[0] == storage
        ]
        if len(free) != 1:
            lost = f"is {here}, which its storage does not list" if here else f"was {volid} and is with neither VM"
            seen = ", ".join(free) or "none"
            raise ValueError(f"{key} {lost}; volumes of {_gib(size)} there that no VM names: {seen}")
        return Move(Act.ATTACH, key, free[0])
    if there not in sizes:
        raise ValueError(f"{key} is {there}, which its storage does not list")
    if here is not None:
        return Move(Act.DROP, key, here)
    storage = there.partition(":")[0]
    for left, gone in unused(source).items():
        if gone not in sizes and gone.partition(":")[0] == storage:
            return Move(Act.DROP, left, gone)
    return Move(Act.DONE)


def attached(noted: Note, key: str, volid: str) -> str:
    """The value of a drive with the options that the disk had."""
    return ",".join(filter(None, [volid, *mapping(noted.options).get(key, "").split(";")]))


def _of(vmid: int) -> re.Pattern[str]:
    """Volume ids of a VM's disks."""
    return re.compile(rf"[:/]vm-{vmid}-disk-")


# What is refused.


def problems(subject: Subject, guest: Guest, node: Node) -> list[str]:
    """Why the VM cannot be destroyed and made anew; empty when it can. Not for one that is in the middle of it."""
    config, sizes, found = subject.config, subject.sizes, []
    if subject.vm.lock:
        found.append(f"it is locked ({subject.vm.lock})")
    if subject.stage is not Stage.IDLE:
        found.append(f"it is in the middle of a rebuild ({subject.stage.value}); finish that or roll it back first")
        return found
    found += unready(subject, guest, node)
    for key, volid in sorted(unused(config).items()):
        if volid not in waste(config, sizes):
            found.append(f"{key} is {volid}, which the deletion would free; attach it or delete it first")
    system = sizes.get(drives(config).get(SYSTEM, ""), 0)
    if subject.free + system < guest.system_disk_gib * GIB:
        found.append(
            f"storage {guest.disk_storage} has {subject.free / GIB:.0f} GiB left and {system / GIB:.0f} GiB of the old "
            f"system disk; the new one needs {guest.system_disk_gib} GiB"
        )
    return found


def waste(config: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """Volumes that an earlier rebuild has noted as its leftovers, of the size that they had."""
    mark = marker(config)
    noted = (entry.rpartition("@") for entry in (mark.waste if mark else ()))
    return [volid for volid, _, size in noted if size.isdigit() and sizes.get(volid) == int(size)]


def not_deletable(now: Situation) -> list[str]:
    """Why the old VM must not be deleted now: all that it names goes with it."""
    noted, config = now.note, now.vm or {}
    if noted is None:
        return ["there is no keeper VM with its data disks"]
    found = [f"with the keeper: {line}" for line in missing(now.keeper or {}, noted, now.sizes)]
    found += [f"{key} is still {volid}" for key, volid in data_disks(config).items()]
    freed = waste(config, now.sizes)
    found += [f"{key} is {volid}" for key, volid in sorted(unused(config).items()) if volid not in freed]
    return found


def not_removable(now: Situation) -> list[str]:
    """Why the keeper must not be deleted now."""
    noted, config = now.note, now.keeper or {}
    if noted is None or now.vm is None:
        return ["the VM is not there"]
    found = [f"with the VM: {line}" for line in missing(now.vm, noted, now.sizes)]
    found += [f"{key} is {volid}" for key, volid in holds(config).items()]
    # A volume of its own that nobody names could be a disk whose move was cut off.
    own = _of(now.keeper_id)
    return found + [f"{volid} is its own" for volid in now.unnamed if own.search(volid) and volid not in noted.kept]


# What is written.


def begun(subject: Subject, run: str, keeper_id: int) -> Marker:
    """The marker of a VM that is to be destroyed. What an earlier rebuild noted as waste stays noted."""
    before, now = marker(subject.config), identity(subject.config)
    return Marker(
        run=run,
        keeper=keeper_id,
        archive=before.archive if before is not None and before.keeper else "",
        waste=before.waste if before is not None else (),
        uuid=now["uuid"],
        mac=now["mac"],
        data=_with_sizes(data_disks(subject.config), subject.sizes),
    )


def first_note(now: Situation, guest: Guest, run: str) -> Note:
    """The keeper's note about a VM that is still whole."""
    config, mark = now.vm or {}, now.mark
    known = identity(config)
    return Note(
        guest=guest.name,
        vmid=guest.vmid,
        run=run,
        genid=_genid(config),
        uuid=known["uuid"],
        mac=known["mac"],
        data=_with_sizes(data_disks(config), now.sizes),
        options=_with_options(config),
        kept=tuple(now.unnamed),
        archive=mark.archive if mark is not None else "",
    )


def _genid(config: Mapping[str, Any]) -> str:
    """A VM's generation id; a VM of an old PVE may have none."""
    return str(config.get("vmgenid", "none"))


def before_move(now: Situation, noted: Note) -> Note:
    """The note as it has to be before the next disk is moved: only then can a cut-off move be told.

    A data disk that the VM was given after the keeper was made is noted, too.
    """
    noted = replace(noted, kept=tuple(now.unnamed))
    if now.vm is None or now.made:
        return noted
    seen = {key: f"{volid}@{now.sizes[volid]}" for key, volid in data_disks(now.vm).items() if volid in now.sizes}
    archive = now.mark.archive if now.mark is not None else noted.archive
    known = mapping(_with_options(now.vm))
    return replace(
        noted,
        data=pairs({**mapping(noted.data), **seen}),
        options=pairs({**mapping(noted.options), **{key: text for key, text in known.items() if key in seen}}),
        archive=archive,
    )


def _with_sizes(disks: Mapping[str, str], sizes: Mapping[str, int]) -> str:
    return pairs({key: f"{volid}@{sizes.get(volid, 0)}" for key, volid in disks.items()})


def _with_options(config: Mapping[str, Any]) -> str:
    """The options of its data disks, without what PVE states about a volume."""
    found = {}
    for key in data_disks(config):
        options = [part for part in str(config[key]).split(",")[1:] if not part.startswith(("size=", "format="))]
        found[key] = ";".join(options)
    return pairs(found)


def keeper_keys(guest: Guest, noted: Note) -> dict[str, str]:
    """The configuration of a new keeper: no network, no firmware disk, nothing that could start."""
    return {
        "name": name(guest),
        "memory": str(MEMORY_MIB),
        "onboot": "0",
        "protection": "1",
        "tags": f"{declared.TAG};{TAG}",
        "description": noted.line(),
    }


def new_keys(guest: Guest, node: Node, noted: Note, mark: Marker) -> dict[str, str]:
    """The new VM as declared, with the old one's SMBIOS UUID and the MAC addresses nobody declares otherwise.

    No data disk: the old ones come back.
    """
    keys = {**declared.declared(guest, node), **declared.volumes(guest, node)}
    for key in ("scsi1", *noted.disks):
        keys.pop(key, None)
    if noted.uuid:
        keys["smbios1"] = f"uuid={noted.uuid}"
    for key, mac in mapping(noted.mac).items():
        model, separator, rest = keys.get(key, "").partition(",")
        if model and "=" not in model:
            keys[key] = f"{model}={mac.upper()}{separator}{rest}"
    keys["description"] = with_line(keys, declared.MARKER, mark.line())
    return keys


# What is told.


def plan(now: Situation, guest: Guest, node: Node) -> tuple[str, tuple[str, ...]]:
    """All of it as one entry of the plan, from where it stands."""
    name, noted = f"VM {guest.vmid} on {node.name}", now.note
    if not now.whole and noted is not None:
        state = "the new VM is there" if now.made else "the old VM is deleted" if now.vm is None else "disks are moved"
        subject = f"go on: destroy {name} and make it anew"
        lines = [f"it is there: {state}; keeper VM {now.keeper_id} of {len(noted.disks)} data disks"]
    elif now.made:
        subject, lines = f"go on: destroy {name} and make it anew", ["it is there: made anew, its data disks are back"]
    else:
        config = now.vm or {}
        subject, lines = f"destroy {name} and make it anew", ["shut down"] if now.running else []
        if guest.backup is not None:
            lines.append(f"back up to {guest.backup.storage} with vzdump")
        else:
            lines.append("no backup is declared: none is taken")
        lines += [
            f"{key}: {volid} ({now.sizes.get(volid, 0) / GIB:g} GiB) -> keeper VM {now.keeper_id}, and back"
            for key, volid in data_disks(config).items()
        ]
        gone = [volid for volid in holds(config).values() if volid not in data_disks(config).values()]
        lines.append(f"delete VM {guest.vmid} with {', '.join(gone)}, and all that the inventory does not declare")
        lines.append("from there on rollback=1 has nothing to go back to")
        known = identity(config)
        kept = [f"SMBIOS UUID {known['uuid']}", *(f"{key} {mac}" for key, mac in mapping(known["mac"]).items())]
        lines.append(f"create it with the same {', '.join(kept)}, unless the inventory says otherwise")
    return subject, (*lines, "deploy, as listed below; then verify")


def standing(guest: Guest, node: Node, now: Situation, lab: str) -> list[str]:
    """What there is after the old VM's deletion: where the data lies, the backup, how to go on."""
    lines = [f"{guest.name}: the old VM {guest.vmid} is deleted; rollback=1 has nothing to go back to."]
    for who, config in ((f"VM {guest.vmid}", now.vm or {}), (f"the keeper VM {now.keeper_id}", now.keeper or {})):
        lines += [
            f"{guest.name}: the data disk on {key} of {who} is {volid}; it was not touched."
            for key, volid in data_disks(config).items()
        ]
    archive = (now.mark.archive if now.mark else "") or (now.note.archive if now.note else "")
    if archive:
        lines.append(
            f"{guest.name}: the backup of before is {archive}; on {node.name} `qmrestore {archive} FREE_ID --unique 1` "
            "restores it as another VM"
        )
    else:
        lines.append(f"{guest.name}: there is no backup of before: none is declared")
    command = f"pyinfra {lab} rebuild.py --limit {guest.name} --data destroy=1"
    return [*lines, f"hint: repair what failed, then `{command}` goes on from here"]


def _gib(size: int) -> str:
    return f"{size / GIB:g} GiB"

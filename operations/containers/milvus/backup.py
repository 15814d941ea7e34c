# SPDX-License-Identifier: MIT
"""Backups of Milvus' collections, their restore, and the check that a new server answers as the one before it.

The work is done on the guest by `gpulab-milvus`, which a step of the deploy writes there; docs/milvus.md says how.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any

from pyinfra import host
from pyinfra.api import QuoteString, StringCommand

from inventory import GpulabError
from operations import files, step
from operations.containers.container import Check, view
from operations.containers.spec import ContainerSpec
from operations.facts import JsonFact
from operations.files import File
from operations.remote import program
from operations.told import Live, Told

PROGRAM = "/usr/local/bin/gpulab-milvus"
SETTINGS = "/etc/gpulab/milvus-backup.json"
#: The tools' own Python: see service.py.
PYTHON = "/opt/gpulab/milvus-tools/bin/python"

#: Seconds that a server has after an upgrade to load its collections and answer as before, and the whole check.
SAME_S, CHECK_S = 300, 900
#: A label becomes part of a folder's name.
LABEL = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")

_ABSENT = json.dumps({"backups": {}, "collections": [], "error": "gpulab-milvus is not installed"})


class MilvusBackups(JsonFact):
    """The complete backups, the oldest first, with the rows of their collections; and the collections there are."""

    def command(self) -> StringCommand:
        return StringCommand(
            f"if test -x {PROGRAM}; then {PROGRAM} list --json; else echo", QuoteString(_ABSENT), "; fi"
        )


def folder(data: str) -> str:
    """Where the backups lie, on the data disk; root's alone."""
    return f"{data}/milvus-backups"


def wanted_files(data: str, keep: int) -> dict[str, File]:
    """gpulab-milvus, and what it reads."""
    text = program(__file__, "client", "store", "rows", "answers", "gpulab_milvus")
    settings = {"folder": folder(data), "disk": data, "keep": keep}
    return {
        PROGRAM: File(f"#!{PYTHON} -I\n{text}\n", 0o755),
        SETTINGS: File(json.dumps(settings, indent=2) + "\n"),
    }


@step.step
def installed(data: str, keep: int) -> step.Commands:
    """
    Ensure that `gpulab-milvus` is on the guest, which backs collections up and restores them.

    + data: mount point of the data disk, on which the backups lie
    + keep: backups without a label that stay
    """
    wanted = wanted_files(data, keep)
    found = step.read(files.Files, paths=sorted(wanted))
    changing = files.differing(found, wanted)
    if not changing:
        step.noop(f"{PROGRAM} is as declared, and keeps {keep} backups")
        return
    for path, file in changing.items():
        if path == PROGRAM:
            step.changes(f"file {path}")
        else:
            files.record(found, {path: file})
    yield files.write(changing)


def upgrade(found: Mapping[str, Any], spec: ContainerSpec) -> tuple[str, str] | None:
    """The image before and after, when a container is there that another image is to take the place of.

    + found: an `EngineFacts` fact
    """
    current = view(found, spec.engine).get("containers", {}).get(spec.name)
    try:
        before = json.loads(current["declaration"])["image"] if current else spec.image
    except (KeyError, ValueError):
        return None
    return (before, spec.image) if before != spec.image else None


def record(name: str, images: tuple[str, str], known: Mapping[str, Any], error: str, without_backup: bool) -> None:
    """Put what an upgrade begins with into the plan.

    + error: why the server before it can't be asked; empty: it can, or nobody has the means to ask yet

    Raises:
        GpulabError: it can't, so nothing would be backed up.
    """
    if without_backup:
        step.notes(
            "Milvus gets another image without a backup of its collections, and without the check of its answers"
        )
        return
    if error:
        raise GpulabError(
            f"{name}: milvus: the server does not answer, so its collections can't be backed up before the upgrade",
            f"It says: {error}\nIt was not replaced.",
            "`docker logs milvus` in the guest; when it answers, deploy again. `--data upgrade_without_backup=1` "
            "replaces it as it is: a newer server may change its files so that the older one can't read them",
        )
    of = f" of server {known['version']}" if known.get("version") else ""
    step.changes(f"back up all collections{of}, and note what they answer, before the upgrade", (
        f"{images[0]} -> {images[1]}",
        "a new server that does not answer the same is taken away again",
    ))  # fmt: skip


def name_now(reason: str) -> str:
    """The name of a backup that is made now."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{reason}"


def before_upgrade(name: str, where: str) -> step.Commands:
    """Back all collections up, and note what they answer, while the server before is at work.

    + name: of the backup
    + where: the guest's name, for errors
    """
    explain = partial(_not_upgraded, where)
    yield Live(PROGRAM, "backup", "--reason", "upgrade", "--called", QuoteString(name), explain=explain)
    yield Told(PROGRAM, "record", QuoteString(name), explain=explain)


def upgrade_check(name: str, data: str) -> Check:
    """What the new server has to pass: the answers noted with the backup `name`."""
    return Check(
        (PROGRAM, "compare", name, "--within", str(SAME_S)),
        CHECK_S,
        f"the backup of before lies on the guest in {folder(data)}/{name}. Should the previous server not read its "
        "files any more, which a newer one may have changed: put its data folder aside, deploy the previous image, and "
        f"`pyinfra INVENTORY milvus.py --limit GUEST --data from_backup={name} --data over=1`. What users deleted "
        "meanwhile is told as a difference, too: then deploy again",
    )


def _not_upgraded(where: str, output: str) -> GpulabError:
    lines = output.strip().splitlines() or ["it said nothing"]
    return GpulabError(
        f"{where}: milvus: its collections could not be backed up, so the server was not replaced",
        "\n".join(lines[-20:]),
        "mend that and deploy again; `--data upgrade_without_backup=1` upgrades without a backup",
    )


@step.step
def backed_up(label: str = "") -> step.Commands:
    """
    Back all collections of Milvus up: a backup more with each run.

    + label: a word of its own; a backup with one stays until somebody removes it
    """
    if label and not LABEL.fullmatch(label):
        raise GpulabError(
            f"--data label={label}: expected small letters, digits and dashes, 64 at most; nothing was changed"
        )
    known = _known()
    if not known["collections"]:
        step.noop("Milvus holds no collection, so there is nothing to back up")
        return
    kept = ("it stays until somebody removes it",) if label else ()
    step.changes(f"back up {len(known['collections'])} collections of Milvus", kept)
    words = ("--name", QuoteString(label)) if label else ()
    yield Live(PROGRAM, "backup", *words, explain=partial(_failed, host.name, "No backup was made."))


@step.step
def restored(
    backup: str, collection: str = "", into: str = "", over: bool = False, new_keys: bool = False
) -> step.Commands:
    """
    Make collections of Milvus anew of a backup; those that are there stay, unless `over` says otherwise.

    A collection appears under its name once all of its rows are there and were compared.

    + backup: its name, or `newest`
    + collection: DATABASE.COLLECTION, or DATABASE; empty: all of the backup's
    + into: another name for the one collection
    + over: drop what is there, once the backup's is complete
    + new_keys: also collections whose keys Milvus makes: their rows get new ones
    """
    known = _known()
    name, todo, there = chosen(known, backup, collection, into, over)
    if not todo:
        step.noop(f"of {name} {', '.join(there)} is there already, and stays (`--data over=1` drops it)")
        return
    for source, target in todo.items():
        instead = " in the place of what is there" if target in known["collections"] else ""
        rows = known["backups"][name]["collections"][source]
        step.changes(f"restore {target} of {name}{instead}", (f"{rows} rows",))
    if there:
        step.notes("collections that are there stay as they are (`--data over=1` drops them)", tuple(there))
    words: list[Any] = [QuoteString(name), *map(QuoteString, todo)]
    words += ["--into", QuoteString(into)] if into else []
    words += [word for word, wanted in (("--over", over), ("--new-keys", new_keys)) if wanted]
    yield Live(PROGRAM, "restore", *words, explain=partial(_failed, host.name, "What is told above it was restored."))


def chosen(
    known: Mapping[str, Any], backup: str, collection: str, into: str, over: bool
) -> tuple[str, dict[str, str], list[str]]:
    """The backup's name, what of it is restored as what, and the collections that stay as they are.

    + known: a `MilvusBackups` fact

    Raises:
        GpulabError: there is no such backup, or no such collection in it.
    """
    names = list(known["backups"])
    name = names[-1] if backup == "newest" and names else backup
    if name not in known["backups"]:
        raise GpulabError(
            f"--data from_backup={backup}: no complete backup of that name; nothing was changed",
            f"There are: {', '.join(names) or 'none'}.",
        )
    held = known["backups"][name]["collections"]
    meant = [each for each in held if collection in ("", each, each.partition(".")[0])]
    if not meant:
        raise GpulabError(
            f"{name} holds no collection {collection or 'at all'}; nothing was changed",
            f"It holds: {', '.join(held) or 'none'}.",
        )
    if into and len(meant) != 1:
        raise GpulabError(f"--data into={into}: expected one collection, meant are {', '.join(meant)}")
    todo = {each: f"{each.partition('.')[0]}.{into}" if into else each for each in meant}
    there = [] if over else [target for target in todo.values() if target in known["collections"]]
    return name, {source: target for source, target in todo.items() if target not in there}, there


def _known() -> Mapping[str, Any]:
    known: Mapping[str, Any] = step.read(MilvusBackups)
    if not known or known["error"]:
        why = known["error"] if known else "the guest does not exist yet"
        raise GpulabError(f"{host.name}: milvus: {why}", resolution="deploy first")
    return known


def _failed(where: str, consequence: str, output: str) -> GpulabError:
    lines = output.strip().splitlines() or ["it said nothing"]
    return GpulabError(f"{where}: milvus: {lines[-1]}", "\n".join([*lines[-20:-1], consequence]))

# SPDX-License-Identifier: MIT
"""`gpulab-milvus` on the guest: backups of Milvus' collections, their restore, and the check of an upgrade. For root.

A backup holds each collection's schema, indexes, aliases, partitions and rows. Users and roles are the deploy's.
"""

import argparse
import contextlib
import datetime
import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from typing import Any

from operations.containers.milvus.remote.answers import KEYS, compare_until, recorded
from operations.containers.milvus.remote.client import connect, kept
from operations.containers.milvus.remote.rows import (
    RESTORING,
    ROWS,
    SENT,
    all_collections,
    batches,
    by_key,
    count,
    description,
    given_twice,
    key_of,
    make,
    make_indexes,
    parts_of,
    readable,
    said,
    send,
    stored_rows,
    types_of,
)
from operations.containers.milvus.remote.store import (
    ANSWERS,
    FORMAT,
    MANIFEST,
    NAME,
    PARTIAL,
    Refused,
    RowsFile,
    backups,
    broken,
    chosen,
    decoded,
    encoded,
    name_of,
    new_backup,
    prunable,
    put_down,
    require_room,
    row_bytes,
    rows_in,
    same,
)
from operations.remote.common import locked

SETTINGS = "/etc/gpulab/milvus-backup.json"
LOCK = "/run/gpulab/milvus-backup.lock"


def logged_in() -> dict[str, Any]:
    login = kept()
    if "password" not in login:
        raise Refused("nobody knows root's password of Milvus here yet: deploy first")
    return login


def settings() -> dict[str, Any]:
    """`folder` of the backups, the mounted `disk` that it lies on, how many to `keep`."""
    with open(SETTINGS) as file:
        found: dict[str, Any] = json.load(file)
    if not os.path.ismount(found["disk"]):
        raise Refused(f"{found['disk']} is not mounted")
    return found


def label_of(about: dict[str, Any]) -> str:
    return f"{about['database']}.{about['name']}"


def meant(label: str, names: list[str]) -> bool:
    """Is `DATABASE.COLLECTION` named, by itself or with its whole database? Without names all are."""
    return not names or label in names or label.partition(".")[0] in names


def backup(given: argparse.Namespace) -> None:
    place, login = settings(), logged_in()
    reason = given.name or given.reason
    name = given.called or name_of(reason, datetime.datetime.now(datetime.UTC))
    if not NAME.fullmatch(name):
        raise Refused(f"{reason!r} is no name for a backup: small letters, digits and dashes, 64 at most")
    found, wanted = [], 0
    for database, each in all_collections(login["uri"], login["password"]):
        client = connect(login["uri"], "root", login["password"], database)
        about = description(client, database, each)
        about["stored"] = stored_rows(client, each)
        # Vectors that the server makes collections of, and neither takes nor loads.
        about["unreadable"] = not about["indexes"] and not about["loaded"] and about["stored"] == 0
        wanted += about["stored"] * row_bytes(about["fields"], about["dynamic"])
        found.append(about)
    os.makedirs(place["folder"], mode=0o700, exist_ok=True)
    require_room(place["folder"], wanted)
    with new_backup(place["folder"], name) as path:
        for number, about in enumerate(found, start=1):
            client = connect(login["uri"], "root", login["password"], about["database"])
            about |= {"files": [], "rows": 0, "duplicates": 0, "changing": False, "sample": []}
            if not about["unreadable"]:
                with readable(client, about):
                    read_rows(client, about, path, number)
            also = f" ({about['duplicates']} more counted: keys given twice)" if about["duplicates"] else ""
            also += " (written to meanwhile)" if about["changing"] else ""
            print(f"{label_of(about)}: {about['rows']} rows{also}", flush=True)
        manifest = {
            "format": FORMAT,
            "complete": True,
            "named": bool(given.name),
            "reason": reason,
            "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "server": connect(login["uri"], "root", login["password"]).get_server_version(),
            "collections": found,
        }
        put_down(os.path.join(path, MANIFEST), manifest)
    print(f"backup {name}: {len(found)} collections, {sum(each['rows'] for each in found)} rows")
    prune(place)


def read_rows(client: Any, about: dict[str, Any], path: str, number: int) -> None:
    """Write all its rows; how many, and some keys for later questions, go into `about`."""
    types, key = types_of(about), key_of(about)["name"]
    at_once = max(1, min(ROWS, 16 * 1024**2 // row_bytes(about["fields"], about["dynamic"])))
    chance = random.Random(0)
    for part_number, part in enumerate(parts_of(about), start=1):
        before = count(client, about["name"], part)
        file = RowsFile(os.path.join(path, f"rows-{number:04}-{part_number:04}.jsonl.gz"))
        for batch in batches(client, about, part, at_once, ["*"]):
            for row in batch:
                file.add(encoded(row, types))
                # Each row has the same chance to be among the sampled ones.
                place = chance.randrange(about["rows"] + file.rows)
                if len(about["sample"]) < KEYS:
                    about["sample"].append(row[key])
                elif place < KEYS:
                    about["sample"][place] = row[key]
            require_room(path, 0)
        kept_rows, after = file.close(), count(client, about["name"], part)
        about["files"].append({"partition": part, **kept_rows})
        about["rows"] += kept_rows["rows"]
        if before != after:
            about["changing"] = True
        elif kept_rows["rows"] != before:
            if not given_twice(client, about, part, before - kept_rows["rows"]):
                raise Refused(f"{label_of(about)}: {before} rows are counted, and {kept_rows['rows']} were read")
            about["duplicates"] += before - kept_rows["rows"]


def prune(place: dict[str, Any]) -> None:
    for name in prunable(backups(place["folder"]), place["keep"]):
        # Under the name of an unfinished one: a killed removal leaves no half backup.
        os.rename(os.path.join(place["folder"], name), os.path.join(place["folder"], name + PARTIAL))
        shutil.rmtree(os.path.join(place["folder"], name + PARTIAL))
        print(f"backup {name} removed: {place['keep']} are kept")


def restore(given: argparse.Namespace) -> None:
    place, login = settings(), logged_in()
    name, manifest = chosen(place["folder"], given.backup)
    path = os.path.join(place["folder"], name)
    wanted = [about for about in manifest["collections"] if meant(label_of(about), given.collections)]
    unknown = [each for each in given.collections if not any(meant(label_of(about), [each]) for about in wanted)]
    if unknown or not wanted:
        raise Refused(f"{name} holds no collection {', '.join(unknown) or 'at all'}")
    if given.into and len(wanted) != 1:
        raise Refused(f"--into names one collection, and {len(wanted)} are meant")
    if wrong := broken(path, manifest, wanted):
        raise Refused("\n".join([f"{name} is damaged; nothing was restored", *wrong]))
    root = connect(login["uri"], "root", login["password"])
    todo = []
    for about in wanted:
        into = given.into or about["name"]
        if about["database"] not in root.list_databases():
            root.create_database(about["database"])
        client = connect(login["uri"], "root", login["password"], about["database"])
        if client.has_collection(into) and not given.over:
            if given.collections:
                raise Refused(f"{about['database']}.{into} is there; nothing was restored. `--over` takes its place")
            print(f"{about['database']}.{into} is there, and stays as it is")
        elif key_of(about).get("auto_id") and not given.new_keys:
            raise Refused(
                f"{label_of(about)}: Milvus makes its keys, and takes none: its rows would get new ones; nothing was "
                "restored. `--new-keys` restores it so"
            )
        else:
            todo.append((client, about, into))
    # Milvus' own files lie on the same disk.
    if todo:
        needed = sum(about["rows"] * row_bytes(about["fields"], about["dynamic"]) for _, about, _ in todo)
        require_room(place["folder"], needed)
    for client, about, into in todo:
        restore_one(client, about, into, path)


def restore_one(client: Any, about: dict[str, Any], into: str, path: str) -> None:
    """Under another name until all of it is right; what was there goes only then."""
    temporary = (RESTORING + into)[:255]
    if client.has_collection(temporary):
        client.drop_collection(temporary)
    make(client, about, temporary)
    try:
        sample = insert_rows(client, about, temporary, path)
        client.flush(temporary)
        make_indexes(client, about, temporary)
        like = {**about, "name": temporary, "loaded": []}
        if not about["unreadable"]:
            with readable(client, like):
                verified(client, like, sample)
    except BaseException:
        with contextlib.suppress(Exception):
            client.drop_collection(temporary)
        raise
    aliases = set(about["aliases"])
    if client.has_collection(into):
        had = client.describe_collection(into)["aliases"]
        aliases |= set(had)
        for alias in had:
            client.drop_alias(alias)
        client.drop_collection(into)
    client.rename_collection(temporary, into)
    taken = []
    for alias in sorted(aliases):
        try:
            client.create_alias(into, alias)
        except Exception as error:
            taken.append(f"alias {alias}: {said(error)}")
    if about["loaded"] and set(about["loaded"]) == set(about["partitions"]):
        client.load_collection(into, timeout=600)
    elif about["loaded"]:
        client.load_partitions(into, about["loaded"], timeout=600)
    print(f"{about['database']}.{into}: {about['rows']} rows restored", *taken, sep="\n", flush=True)


def insert_rows(client: Any, about: dict[str, Any], name: str, path: str) -> dict[Any, dict[str, Any]]:
    """All rows of the backup; some of them by the keys that they have now."""
    types, key, auto = types_of(about), key_of(about)["name"], bool(key_of(about).get("auto_id"))
    chosen_keys = set(about["sample"])
    sample: dict[Any, dict[str, Any]] = {}
    for each in about["files"]:
        for rows in portions(os.path.join(path, each["name"])):
            had = [row.pop(key) if auto else row[key] for row in rows]
            keys = send(client, name, each["partition"], [decoded(row, types) for row in rows])
            sample |= {new: row for old, new, row in zip(had, keys, rows, strict=True) if old in chosen_keys}
    return sample


def portions(path: str) -> Iterator[list[dict[str, Any]]]:
    """Rows of a file, as many as go over the wire at once."""
    rows: list[dict[str, Any]] = []
    size = 0
    for row in rows_in(path):
        rows.append(row)
        size += len(json.dumps(row))
        if len(rows) >= ROWS or size >= SENT:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def verified(client: Any, about: dict[str, Any], sample: dict[Any, dict[str, Any]]) -> None:
    """
    Raises:
        Refused: what was restored is not what was backed up.
    """
    name, types, key = about["name"], types_of(about), key_of(about)["name"]
    there = count(client, name)
    if there != about["rows"]:
        raise Refused(f"{label_of(about)}: {there} rows came back of {about['rows']}; it was taken away again")
    found = by_key(client, about, name, list(sample))
    for each, row in sample.items():
        back = encoded(found.get(each, {}), types)
        if not same(back, {**row, key: each}):
            raise Refused(f"{label_of(about)}: the row of key {each} came back otherwise; it was taken away again")


def listed(given: argparse.Namespace) -> None:
    if given.json:
        print(json.dumps(overview()))
        return
    known = backups(settings()["folder"])
    for name, manifest in known.items():
        rows = sum(each["rows"] for each in manifest["collections"])
        size = sum(file["bytes"] for each in manifest["collections"] for file in each["files"])
        also = ", kept for its name" if manifest["named"] else ""
        print(
            f"{name}: server {manifest['server']}, {len(manifest['collections'])} collections, {rows} rows, "
            f"{-(-size // 1024**2)} MiB{also}"
        )
        for each in manifest["collections"]:
            print(f"  {label_of(each)}: {each['rows']} rows")
    if not known:
        print("no backup yet")


def overview() -> dict[str, Any]:
    """The backups, and the `collections` that there are now; `error`: why one or the other is not known."""
    found: dict[str, Any] = {"backups": {}, "collections": [], "error": ""}
    try:
        for name, manifest in backups(settings()["folder"]).items():
            held = {label_of(each): each["rows"] for each in manifest["collections"]}
            found["backups"][name] = {"server": manifest["server"], "named": manifest["named"], "collections": held}
        login = logged_in()
        found["collections"] = [".".join(each) for each in all_collections(login["uri"], login["password"])]
    except Exception as error:
        found["error"] = said(error)
    return found


def check(given: argparse.Namespace) -> None:
    place = settings()
    name, manifest = chosen(place["folder"], given.backup)
    if wrong := broken(os.path.join(place["folder"], name), manifest):
        raise Refused("\n".join([f"{name} is damaged", *wrong]))
    print(f"{name}: all files are as they were written")


def record(given: argparse.Namespace) -> None:
    place, login = settings(), logged_in()
    name, manifest = chosen(place["folder"], given.backup)
    found = recorded(login, manifest)
    put_down(os.path.join(place["folder"], name, ANSWERS), found)
    asked = sum(len(each["by_key"]) + len(each["searches"]) for each in found.values() if each)
    print(f"{name}: {asked} answers of {len(found)} collections recorded")


def compare(given: argparse.Namespace) -> None:
    place, login = settings(), logged_in()
    name, manifest = chosen(place["folder"], given.backup)
    try:
        with open(os.path.join(place["folder"], name, ANSWERS)) as file:
            before = json.load(file)
    except FileNotFoundError:
        raise Refused(f"{name}: no answers were recorded") from None
    lines = compare_until(login, manifest, before, given.within)
    if lines:
        shown = [*lines[:20], *([f"and {len(lines) - 20} more"] if len(lines) > 20 else [])]
        raise Refused("\n".join(["collections do not answer as before", *shown]))
    print(f"{name}: {len(before)} collections answer as before")


def words_given() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpulab-milvus", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, act: Any, about: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=about)
        found.set_defaults(act=act)
        return found

    made = command("backup", backup, "back all collections up")
    made.add_argument("--name", default="", help="a word of its own; a backup with one is never pruned")
    made.add_argument("--reason", default="by-hand", help=argparse.SUPPRESS)
    made.add_argument("--called", default="", help=argparse.SUPPRESS)
    back = command("restore", restore, "make collections anew of a backup, those that are absent")
    back.add_argument("backup", help="its name, or `newest`")
    back.add_argument("collections", nargs="*", help="DATABASE.COLLECTION, or DATABASE for all of it")
    back.add_argument("--into", default="", help="another name for the one collection")
    back.add_argument("--over", action="store_true", help="drop what is there once the backup's is complete")
    back.add_argument("--new-keys", action="store_true", help="also where Milvus makes the keys")
    command("list", listed, "the complete backups").add_argument("--json", action="store_true")
    for name, act, about in (
        ("check", check, "are a backup's files as they were written?"),
        ("record", record, "note what the collections of a backup answer now"),
        ("compare", compare, "do they still answer what `record` noted?"),
    ):
        command(name, act, about).add_argument("backup", help="its name, or `newest`")
    commands.choices["compare"].add_argument("--within", type=float, default=0, help="seconds to become so")
    return parser.parse_args()


def main() -> int:
    given = words_given()
    os.umask(0o077)
    if os.geteuid() != 0:
        print("gpulab-milvus is for root", file=sys.stderr)
        return 2
    try:
        if given.act in (listed, check):
            given.act(given)
            return 0
        with locked(LOCK, wait=False) as alone:
            if not alone:
                raise Refused("another gpulab-milvus is at work")
            given.act(given)
    except Refused as refused:
        print(refused, file=sys.stderr)
    except Exception as error:
        print(f"Milvus refuses: {said(error)}" if not isinstance(error, OSError) else error, file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""Backups of Milvus without a server: their folder, which of them go, what is restored, and when one is made."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from inventory import GpulabError
from inventory.services import Milvus
from operations.containers.milvus import Passwords, backup, milvus_spec
from operations.containers.milvus.remote import answers, store

TYPES = {"key": "INT64", "vector": "FLOAT_VECTOR", "bits": "BINARY_VECTOR"}
ROW = {"key": 1, "vector": [0.5, -2.0], "bits": [b"\x01\xff"], "text": "ü", "number": 2**60}


@contextmanager
def written(folder: Path, name: str, named: bool = False, **keys: Any) -> Iterator[Path]:
    """A backup of one collection, as `gpulab-milvus` writes it; what is done inside happens before it is complete."""
    with store.new_backup(str(folder), name) as path:
        file = store.RowsFile(f"{path}/rows-0001-0001.jsonl.gz")
        file.add(store.encoded(ROW, TYPES))
        collection = {"database": "astro", "name": "c", "rows": 1, "files": [file.close()]}
        manifest = {"format": 1, "complete": True, "named": named, "collections": [collection], **keys}
        store.put_down(f"{path}/{store.MANIFEST}", manifest)
        yield Path(path)


def names(folder: Path) -> list[str]:
    return list(store.backups(str(folder)))


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    with written(tmp_path, "20260101T000000Z-one"):
        pass
    (row,) = store.rows_in(str(tmp_path / "20260101T000000Z-one/rows-0001-0001.jsonl.gz"))

    assert store.decoded(row, TYPES) == {**ROW, "bits": b"\x01\xff"}
    assert "-2" not in json.dumps(row["vector"]), "a vector is no list of digits"


def test_numbers_that_are_none_are_the_same_as_themselves() -> None:
    assert store.same({"x": math.nan}, {"x": math.nan})
    assert not store.same({"x": math.nan}, {"x": 0.0})


def test_one_that_fails_or_is_killed_is_no_backup(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), written(tmp_path, "20260101T000000Z-one"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []

    # Killed: it keeps its other name, whatever is in it, until the next one.
    with written(tmp_path, "20260102T000000Z-two") as path:
        assert path.name == "20260102T000000Z-two.partial"
        assert names(tmp_path) == []
        copy = tmp_path / "20260101T000000Z-one.partial"
        copy.mkdir()
        (copy / store.MANIFEST).write_text((path / store.MANIFEST).read_text())
    assert names(tmp_path) == ["20260102T000000Z-two"]
    with written(tmp_path, "20260103T000000Z-three"):
        pass
    assert [path.name for path in sorted(tmp_path.iterdir())] == names(tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_second_one_of_a_name_is_refused(tmp_path: Path) -> None:
    with written(tmp_path, "20260101T000000Z-one"):
        pass
    with pytest.raises(store.Refused, match="there is a backup"), written(tmp_path, "20260101T000000Z-one"):
        pass
    assert names(tmp_path) == ["20260101T000000Z-one"]


def test_it_is_roots_alone(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir(mode=0o755)
    with written(folder, "20260101T000000Z-one"):
        pass
    assert [path.stat().st_mode & 0o777 for path in (folder, folder / "20260101T000000Z-one")] == [0o700, 0o700]


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_oldest_go_and_never_the_newest_nor_named_ones(tmp_path: Path, keep: int) -> None:
    for day in range(1, 6):
        with written(tmp_path, f"2026010{day}T000000Z-x", named=day in (1, 3)):
            pass
    known = store.backups(str(tmp_path))

    gone = store.prunable(known, keep)

    unnamed = ["20260102T000000Z-x", "20260104T000000Z-x", "20260105T000000Z-x"]
    assert gone == unnamed[: max(3 - keep, 0)]
    assert store.prunable(known, 0) == unnamed[:2]


def test_what_is_wrong_with_a_file_is_told(tmp_path: Path) -> None:
    with written(tmp_path, "20260101T000000Z-one"):
        pass
    name, manifest = store.chosen(str(tmp_path), "newest")
    folder = tmp_path / name
    assert store.broken(str(folder), manifest) == []
    (path,) = folder.glob("rows-*")

    path.write_bytes(path.read_bytes()[:-1])
    assert store.broken(str(folder), manifest)[0].startswith(f"{path} was changed: SHA-256 ")
    path.unlink()
    assert store.broken(str(folder), manifest) == [f"{path}: No such file or directory"]


def test_one_of_a_later_format_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(store.Refused, match="no complete backup newest in"):
        store.chosen(str(tmp_path), "newest")
    with written(tmp_path, "20260101T000000Z-one", format=2):
        pass
    with pytest.raises(store.Refused, match="has format 2, and this program knows 1"):
        store.chosen(str(tmp_path), "newest")


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    store.require_room(str(tmp_path), 0)
    with pytest.raises(store.Refused, match="about 1073741824 MiB are needed beside the 256 MiB that stay free"):
        store.require_room(str(tmp_path), 2**50)


def test_rows_are_estimated_by_their_vectors() -> None:
    fields = [{"type": "INT64", "params": {}}, {"type": "FLOAT_VECTOR", "params": {"dim": "768"}}]
    assert store.row_bytes(fields, dynamic=False) == 16 + 4096
    fields[1]["type"] = "BINARY_VECTOR"
    assert store.row_bytes(fields, dynamic=False) == 16 + 128


@pytest.mark.parametrize("name", ["20260101T000000Z-upgrade", "20260101T000000Z-a-b-9"])
def test_names_that_are_one(name: str) -> None:
    assert store.NAME.fullmatch(name)


@pytest.mark.parametrize("name", ["20260101T000000Z-", "20260101T000000Z-A", "20260101T000000Z-a/b", "x", ".."])
def test_names_that_are_none(name: str) -> None:
    assert not store.NAME.fullmatch(name)


def test_the_guests_and_the_control_machines_names_are_alike() -> None:
    now = store.name_of("upgrade", datetime.datetime.now(datetime.UTC))
    assert store.NAME.fullmatch(now) and store.NAME.fullmatch(backup.name_now("upgrade"))


INDEX = {"index_type": "HNSW"}
ABOUT = {
    "fields": [1],
    "dynamic": True,
    "indexes": [INDEX],
    "aliases": ["a"],
    "partitions": ["p", "q"],
}
HITS = [[number, float(number)] for number in range(10)]
BEFORE = {
    "about": ABOUT,
    "rows": 5,
    "by_key": {"1": {"key": 1, "x": 2}, "2": {"key": 2, "x": 3}},
    "searches": {"1": HITS},
}


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ({}, []),
        ({"rows": 6}, []),
        ({"rows": 4}, ["c: 4 rows, before 5"]),
        ({"about": {**ABOUT, "aliases": ["a", "b"], "partitions": ["q", "p", "r"]}}, []),
        ({"about": {**ABOUT, "aliases": []}}, ["c: no aliases a any more"]),
        ({"about": {**ABOUT, "partitions": ["p"]}}, ["c: no partitions q any more"]),
        ({"about": {**ABOUT, "indexes": []}}, ["c: its indexes differ"]),
        ({"about": {**ABOUT, "indexes": [{"index_type": "FLAT"}]}}, ["c: its indexes differ"]),
        # A newer server has more to say of it.
        ({"about": {**ABOUT, "indexes": [{**INDEX, "mmap.enabled": "false"}]}}, []),
        ({"by_key": {"2": {"key": 2, "x": 3}}}, ["c: no row of key 1 any more"]),
        ({"by_key": {**BEFORE["by_key"], "1": {"key": 1, "x": 0}}}, ["c: the row of key 1 differs in x"]),
        ({"searches": {}}, ["c: nothing answers the search for what is near 1"]),
        ({"searches": {"1": HITS[:9]}}, ["c: the search for what is near 1 has 9 hits, before 10"]),
        # The index is another approximation; what is as far away as the last one is no other answer.
        ({"searches": {"1": [*HITS[:4], [99, 4.5], *HITS[5:]]}}, []),
        ({"searches": {"1": [*HITS[:9], [99, 9.0]]}}, []),
        (
            {"searches": {"1": [*HITS[:3], [98, 3.5], [99, 4.5], *HITS[5:]]}},
            ["c: the search for what is near 1 has 2 other hits of 10"],
        ),
        (
            {"searches": {"1": [*HITS[:9], [9, 9.5]]}},
            ["c: the search for what is near 1 has other distances (9 and others)"],
        ),
    ],
)
def test_each_loss_is_a_line(keys: dict[str, Any], lines: list[str]) -> None:
    assert answers.compared({"c": BEFORE}, {"c": {**BEFORE, **keys}}) == lines


def test_a_collection_that_is_gone_is_a_loss_and_one_that_was_gone_before_is_none() -> None:
    assert answers.compared({"c": BEFORE}, {"c": None}) == ["c: the collection is gone"]
    assert answers.compared({"c": None}, {"c": BEFORE}) == []


KNOWN: dict[str, Any] = {
    "backups": {
        "20260101T000000Z-a": {"collections": {"astro.c": 1}},
        "20260102T000000Z-b": {"collections": {"astro.c": 1, "astro.d": 2, "ml.c": 3}},
    },
    "collections": ["astro.c"],
    "error": "",
}


@pytest.mark.parametrize(
    ("words", "todo", "there"),
    [
        (("newest", "", "", False), {"astro.d": "astro.d", "ml.c": "ml.c"}, ["astro.c"]),
        (("newest", "", "", True), {"astro.c": "astro.c", "astro.d": "astro.d", "ml.c": "ml.c"}, []),
        (("20260101T000000Z-a", "", "", False), {}, ["astro.c"]),
        (("newest", "ml", "", False), {"ml.c": "ml.c"}, []),
        (("newest", "astro.c", "old", False), {"astro.c": "astro.old"}, []),
    ],
)
def test_what_is_restored(words: tuple[str, str, str, bool], todo: dict[str, str], there: list[str]) -> None:
    name, *found = backup.chosen(KNOWN, *words)
    assert found == [todo, there]
    assert name == (words[0] if words[0] in KNOWN["backups"] else "20260102T000000Z-b")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("other", "", "", False), "--data from_backup=other: no complete backup of that name; nothing was changed"),
        (("newest", "astro.x", "", False), "20260102T000000Z-b holds no collection astro.x; nothing was changed"),
        (("newest", "astro", "old", False), "--data into=old: expected one collection, meant are astro.c, astro.d"),
    ],
)
def test_what_cannot_be_restored_is_told(words: tuple[str, str, str, bool], message: str) -> None:
    with pytest.raises(GpulabError) as caught:
        backup.chosen(KNOWN, *words)
    assert caught.value.brief == message


def spec(image: str) -> Any:
    service = Milvus.model_validate({"image": f"milvusdb/milvus@sha256:{64 * image}"})
    return milvus_spec(service, "/srv/data", Passwords({}, "of-storage", "key"))


def engine(current: Any, **keys: Any) -> dict[str, Any]:
    container = {"declaration": json.dumps(current.declaration()), **keys}
    return {"info": {}, "containers": {"milvus": container}}


def test_only_another_image_is_an_upgrade() -> None:
    new, old = spec("b"), spec("a")
    assert backup.upgrade(engine(old), new) == (old.image, new.image)
    assert backup.upgrade(engine(new), new) is None
    assert backup.upgrade({}, new) is None, "a guest that does not exist yet"
    assert backup.upgrade({"info": {}, "containers": {}}, new) is None
    assert backup.upgrade(engine(old, declaration=""), new) is None


def test_a_server_that_does_not_answer_is_not_upgraded() -> None:
    with pytest.raises(GpulabError) as caught:
        backup.record("gpu01", ("old", "new"), {}, "Fail connecting", without_backup=False)
    assert str(caught.value) == (
        "gpu01: milvus: the server does not answer, so its collections can't be backed up before the upgrade\n"
        "It says: Fail connecting\n"
        "It was not replaced.\n"
        "hint: `docker logs milvus` in the guest; when it answers, deploy again. `--data upgrade_without_backup=1` "
        "replaces it as it is: a newer server may change its files so that the older one can't read them"
    )


def test_the_check_names_the_backup_and_the_way_back() -> None:
    check = backup.upgrade_check("20260101T000000Z-upgrade", "/srv/data")
    assert check.words[:3] == ("/usr/local/bin/gpulab-milvus", "compare", "20260101T000000Z-upgrade")
    assert "/srv/data/milvus-backups/20260101T000000Z-upgrade" in check.resolution
    assert "--data from_backup=20260101T000000Z-upgrade" in check.resolution

# SPDX-License-Identifier: MIT
"""`gpulab-milvus` before the real server: what is backed up comes back, and what is damaged does not."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rehearsal.registry.milvus import recipe
from tests.rehearsal.milvus_server import network, serving
from tests.slow.milvus_backups import Guest, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a network namespace"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    folder = tmp_path_factory.mktemp("milvus")
    with network() as loopback, serving(recipe.NOW, folder, loopback, settings(folder)):
        yield Guest(loopback, folder)


@pytest.fixture
def guest(running: Guest) -> Guest:
    """The server with an empty database astro, and no backup."""
    for each in running.backups.glob("*"):
        subprocess.run(["rm", "-rf", str(each)], check=True)
    running.client(
        "if 'astro' not in A.list_databases(): A.create_database('astro')\n"
        "A = MilvusClient(uri, token='root:Milvus', db_name='astro')\n"
        "for name in A.list_collections():\n"
        "    for alias in A.describe_collection(name)['aliases']: A.drop_alias(alias)\n"
        "    A.drop_collection(name)",
        "default",
    )
    return running


#: A collection of everything that a row can be.
ALL_KINDS = """
make("all", key=D.VARCHAR, consistency_level="Strong", properties={"collection.ttl.seconds": "8640000"}, more=[
    ("i8", D.INT8, {}), ("b", D.BOOL, {}), ("f", D.FLOAT, {}), ("d", D.DOUBLE, {}), ("j", D.JSON, {}),
    ("ints", D.ARRAY, {"element_type": D.INT64, "max_capacity": 4}),
    ("texts", D.ARRAY, {"element_type": D.VARCHAR, "max_length": 8, "max_capacity": 4}),
])
keys = ["plain", 'a"quote', "back\\\\slash", "new\\nline", "ünïcödé", "'single'"] + [f"k{n}" for n in range(1500)]
A.create_partition("all", "late")
def row(n, key):
    return {"key": key, "vector": [n / 3, 1.0, -2.5, n], "i8": n % 100, "b": bool(n % 2), "f": n / 7, "d": n / 7,
            "j": {"n": [n, None, {"ö": 2**60}]}, "ints": [n] * (n % 4), "texts": ["é"] * (n % 3),
            "extra": n, "nested": {"x": [n]}}
data = [row(n, key) for n, key in enumerate(keys)]
A.insert("all", data[:1000])
A.insert("all", data[1000:], partition_name="late")
params = A.prepare_index_params()
params.add_index("f")
A.create_index("all", params)
A.create_alias("all", "everything")
"""
#: How a collection is and what it holds.
LOOK = """
def look(name):
    found = A.describe_collection(name)
    about = {key: found[key] for key in ("fields", "enable_dynamic_field", "num_shards", "consistency_level", "aliases",
                                         "properties", "num_partitions", "description", "auto_id")}
    parts = A.list_partitions(name)
    about["parts"] = {part: A.get_load_state(name, partition_name=part)["state"].name for part in parts}
    about["indexes"] = sorted(({key: value for key, value in A.describe_index(name, each).items() if "rows" not in key}
                               for each in A.list_indexes(name)), key=str)
    return about
"""


def test_a_collection_of_everything_comes_back_as_it_was(guest: Guest) -> None:
    read = LOOK + (
        "A.flush('all')\n"
        "found = [look('all'), rows('all', 'key >= \"\"', partition_names=['late']), "
        "A.query('all', filter='', output_fields=['count(*)'])[0]['count(*)'], "
        "rows('all', 'extra < 6')]\n"
        "print(json.dumps(found, default=str))"
    )
    guest.client(ALL_KINDS)
    before = guest.client(read)
    assert (len(before[1]), before[2], len(before[3])) == (506, 1506, 6)

    said = guest.done("backup", "--name", "all-kinds")

    assert "astro.all: 1506 rows" in said
    (folder,) = guest.backups.iterdir()
    assert folder.name.endswith("Z-all-kinds") and folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert "damaged" not in guest.done("check", "newest")
    assert guest.client(read) == before, "reading changed nothing"
    assert guest.refused("restore", "newest", "astro.all").startswith("astro.all is there; nothing was restored")

    guest.client("A.drop_alias('everything'); A.drop_collection('all')")
    assert "astro.all: 1506 rows restored" in guest.done("restore", "newest")
    assert guest.client(read) == before
    assert "astro.all is there, and stays as it is" in guest.done("restore", "newest")

    # Beside it, and over what was changed; the alias belongs to the first.
    assert "alias everything: " in guest.done("restore", "newest", "astro.all", "--into", "copy")
    guest.client("A.delete('all', filter='extra < 1000'); A.create_alias('all', 'later')")
    guest.done("restore", "newest", "astro.all", "--over")
    assert guest.client("print(json.dumps(A.describe_collection('later')['collection_name']))") == "all"
    guest.client("A.drop_alias('later')")
    assert guest.client(read) == before
    assert sorted(guest.client("print(json.dumps(A.list_collections()))")) == ["all", "copy"]


@pytest.mark.parametrize(
    ("words", "value"),
    [
        ("vector=D.BINARY_VECTOR, dim=16, index=('BIN_FLAT', 'HAMMING', {})", "bytes([n, 255 - n])"),
        ("vector=D.FLOAT16_VECTOR, dim=2, index=('FLAT', 'L2', {})", "bytes([n, 60, 0, 60])"),
        ("load=False", "[n, 0.1, 0.2, 0.3]"),
        ("index=None", "[n, 0.1, 0.2, 0.3]"),
        ("dynamic=False, more=[('kind', D.INT64, {'is_partition_key': True})], num_partitions=4", "[n, 0.1, 0.2, 0.3]"),
    ],
    ids=["binary", "float16", "not-loaded", "without-index", "partition-key"],
)
def test_other_vectors_and_states_come_back(guest: Guest, words: str, value: str) -> None:
    kind = ", 'kind': n % 7" if "kind" in words else ""
    guest.client(f"make('c', {words})\nA.insert('c', [{{'key': n, 'vector': {value}{kind}}} for n in range(100)])")
    look = LOOK + "print(json.dumps(look('c'), default=str))"
    index = (
        "make_index = A.prepare_index_params()\nmake_index.add_index('vector', index_type='FLAT', metric_type='L2')\n"
    )
    load = index + "A.create_index('c', make_index)\n" if "index=None" in words else ""
    hold = load + "print(json.dumps(rows('c'), default=str))"
    before = guest.client(look)

    guest.done("backup")
    assert guest.client(look) == before, "reading left it as it was"
    guest.client("A.drop_collection('c')")
    guest.done("restore", "newest", "astro")

    assert guest.client(look) == before
    held = guest.client(hold)
    assert len(held) == 100 and sorted(row["key"] for row in held) == list(range(100))


def test_what_milvus_makes_the_keys_of_is_restored_only_with_new_ones(guest: Guest) -> None:
    guest.client("make('c', auto_id=True)\nA.insert('c', [{'vector': [n, 0, 0, 0], 'n': n} for n in range(50)])")
    guest.done("backup")
    guest.client("A.drop_collection('c')")

    assert "its rows would get new ones; nothing was restored" in guest.refused("restore", "newest")
    assert guest.client("print(json.dumps(A.list_collections()))") == []

    guest.done("restore", "newest", "--new-keys")
    assert guest.client("print(json.dumps(sorted(row['n'] for row in rows('c'))))") == list(range(50))


def test_empty_collections_and_those_that_cannot_hold_anything(guest: Guest) -> None:
    guest.client("make('empty')\nmake('bare', index=None)")
    guest.done("backup")
    assert [each["rows"] for each in guest.manifest()["collections"]] == [0, 0]
    guest.client("A.drop_collection('empty'); A.drop_collection('bare')")
    guest.done("restore", "newest")
    assert sorted(guest.client("print(json.dumps(A.list_collections()))")) == ["bare", "empty"]

    # This server makes such a collection, and has no word for its rows.
    guest.client("make('sparse', vector=D.INT8_VECTOR, index=None)")
    said = guest.refused("backup")
    assert said == "collection astro.sparse: field vector is of type INT8_VECTOR, which this program does not know"


def test_keys_that_were_given_twice_are_told(guest: Guest) -> None:
    guest.client(
        "make('c')\nA.insert('c', [{'key': n // 2 * 2, 'vector': [n, 0, 0, 0]} for n in range(10)])\n"
        "A.insert('c', [{'key': 4, 'vector': [n, 0, 0, 0]} for n in range(3)])"
    )
    counted = guest.client(
        "print(A.query('c', filter='', output_fields=['count(*)'], consistency_level='Strong')[0]['count(*)'])"
    )
    assert counted > 5
    assert f"astro.c: 5 rows ({counted - 5} more counted: keys given twice)" in guest.done("backup")


def test_a_killed_backup_is_none(guest: Guest) -> None:
    guest.client(
        "make('c')\nfor n in range(30): A.insert('c', [{'key': n * 1000 + k, 'vector': [k] * 4} for k in range(1000)])"
    )
    process = subprocess.Popen(guest.words("backup"), stdout=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(guest.backups.glob("*.partial/rows-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    assert list(guest.backups.glob("*.partial")), "it was killed half way"
    assert guest.done("list") == "no backup yet\n"
    assert guest.refused("restore", "newest").startswith("no complete backup newest")
    assert "astro.c: 30000 rows" in guest.done("backup")
    assert not list(guest.backups.glob("*.partial"))
    assert guest.done("list").count("\n") == 2


def test_a_changed_file_is_refused_before_anything_is_made(guest: Guest) -> None:
    guest.client("make('c')\nA.insert('c', [{'key': n, 'vector': [n] * 4} for n in range(10)])")
    guest.done("backup")
    guest.client("A.drop_collection('c')")
    (path,) = guest.backups.glob("*/rows-*")
    text = gzip.decompress(path.read_bytes()).replace(b'"key":3', b'"key":4')
    path.write_bytes(gzip.compress(text))

    assert f"{path} was changed" in guest.refused("check", "newest")
    assert f"{path} was changed" in guest.refused("restore", "newest")
    assert guest.client("print(json.dumps(A.list_collections()))") == []
    path.unlink()
    assert f"{path}: No such file" in guest.refused("check", "newest")


def test_old_backups_go_and_named_ones_stay(guest: Guest) -> None:
    for number, words in enumerate(((), ("--name", "mine"), (), ())):
        guest.done("backup", "--called", f"20260101T00000{number}Z-{words[1] if words else 'by-hand'}", *words)
    assert [path.name[14:] for path in sorted(guest.backups.iterdir())] == ["1Z-mine", "2Z-by-hand", "3Z-by-hand"]


def test_answers_are_compared_and_losses_are_told(guest: Guest) -> None:
    guest.client(
        "make('c')\nmake('d', load=False)\n"
        "for name in 'cd': A.insert(name, [{'key': n, 'vector': [n, n % 7, 0, 1], 'n': n} for n in range(500)])"
    )
    guest.done("backup")
    assert guest.refused("compare", "newest").endswith("no answers were recorded")
    assert "of 2 collections recorded" in guest.done("record", "newest")
    assert "2 collections answer as before" in guest.done("compare", "newest")
    # Users go on meanwhile.
    guest.client("A.insert('c', [{'key': 1000, 'vector': [9000, 0, 0, 1]}])")
    guest.done("compare", "newest")

    kept = guest.manifest()["collections"][0]["sample"][0]
    guest.client(f"A.delete('c', ids=[{kept}])")
    said = guest.refused("compare", "newest").splitlines()
    assert said[0] == "collections do not answer as before"
    assert f"astro.c: no row of key {kept} any more" in said
    guest.client(f"A.insert('c', [{{'key': {kept}, 'vector': [0, 0, 0, 1], 'n': -1}}])")
    assert f"astro.c: the row of key {kept} differs in " in guest.refused("compare", "newest")
    guest.client("A.drop_collection('d')")
    assert "astro.d: the collection is gone" in guest.refused("compare", "newest")
    known = json.loads(guest.done("list", "--json"))
    assert [each["collections"] for each in known["backups"].values()] == [{"astro.c": 500, "astro.d": 500}]
    assert (known["collections"], known["error"]) == (["astro.c"], "")


def test_a_full_disk_is_seen_before_anything_is_written(guest: Guest, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "none", str(disk)], check=True)
    told = guest.folder / "etc/milvus-backup.json"
    before = told.read_text()
    guest.client("make('c')\nA.insert('c', [{'key': 1, 'vector': [1] * 4}])")
    guest.done("backup")
    (made,) = guest.backups.iterdir()
    try:
        told.write_text(json.dumps({"folder": f"{disk}/backups", "disk": str(disk), "keep": 2}))
        said = guest.refused("backup")
        assert "MiB are free, and about 1 MiB are needed beside the 256 MiB that stay free" in said
        assert list((disk / "backups").iterdir()) == []

        shutil.copytree(made, disk / "backups" / made.name)
        said = guest.refused("restore", "newest", "astro.c", "--into", "other")
        assert "about 1 MiB are needed beside the 256 MiB that stay free" in said
        assert guest.client("print(json.dumps(A.list_collections()))") == ["c"]
    finally:
        told.write_text(before)
        subprocess.run(["umount", str(disk)], check=True)
    told.write_text(before.replace('"/"', f'"{disk}"'))
    assert guest.refused("backup") == f"{disk} is not mounted"
    told.write_text(before)

# SPDX-License-Identifier: MIT
"""gpulab-milvus: back up Milvus' collections, restore them, and see whether they answer as they did.

gpulab-milvus backup
gpulab-milvus list
gpulab-milvus restore astro/stars --into stars_of_yesterday
gpulab-milvus restore astro/stars --backup 20261129T051000Z --replace
gpulab-milvus compare

For root. docs/milvus.md says what a backup holds.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

from operations.containers.milvus.remote.client import connect, kept, words
from operations.containers.milvus.remote.rows import Broken, check, lost, read, write

SETTINGS = "/etc/gpulab/milvus-backups.json"
#: A backup's name: the time of its start, UTC.
NAME = "%Y%m%dT%H%M%SZ"
#: Rows of a request, and bytes that its vectors may have: the server refuses more than 64 MiB.
BATCH_ROWS, BATCH_BYTES = 1000, 16 << 20
#: Searches that are kept of each collection, and neighbours of each.
SEARCHES, NEIGHBOURS = 8, 10
#: The share of those neighbours that must come again. The index may have been made anew, and none but brute force is
#: exact.
RECALL = 0.95
#: Seconds that a collection may take into memory.
LOAD_S = 300
#: What `describe_index` has beside the index' own parameters.
ABOUT = ("field_name", "index_name", "index_type", "metric_type", "total_rows", "indexed_rows", "pending_index_rows")


class Failed(Exception):
    """What went wrong, in words for whoever called."""


class Store:
    """The folder of all backups; a backup is there in whole or not at all."""

    def __init__(self, folder: str, keep: int) -> None:
        self.folder, self.keep = folder, keep

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else writes here meanwhile. Rows of all tenants are root's alone to read."""
        if not os.path.isdir(parent := os.path.dirname(self.folder)):
            raise Failed(f"{parent} is missing")
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        with open(os.path.join(self.folder, ".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Failed("another backup or restore runs") from None
            yield

    def names(self) -> list[str]:
        """The complete backups, oldest first."""
        found = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted(name for name in found if re.fullmatch(r"\d{8}T\d{6}Z", name))

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def content(self, name: str = "latest") -> dict[str, Any]:
        """What a backup says of itself."""
        names = self.names()
        if not names:
            raise Failed(f"there is no backup in {self.folder}")
        wanted = names[-1] if name == "latest" else name
        if wanted not in names:
            raise Failed(f"there is no backup {wanted}; there are {', '.join(names)}")
        with open(self.path(wanted, "backup.json")) as file:
            found: dict[str, Any] = json.load(file)
        return {**found, "name": wanted}

    def new(self) -> str:
        """A folder for a backup that is being written; what a killed run left is removed."""
        for name in os.listdir(self.folder):
            if name.endswith(".new"):
                shutil.rmtree(self.path(name))
        name = time.strftime(NAME, time.gmtime())
        if os.path.exists(self.path(name)):
            raise Failed(f"there is a backup {name}")
        os.mkdir(self.path(f"{name}.new"), 0o700)
        return name

    def done(self, name: str, content: dict[str, Any]) -> list[str]:
        """Make it count, and remove those that are too many; their names."""
        with open(self.path(f"{name}.new", "backup.json"), "w") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.rename(self.path(f"{name}.new"), self.path(name))
        descriptor = os.open(self.folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
        gone = self.names()[: -self.keep]
        for each in gone:
            shutil.rmtree(self.path(each))
        return gone


class Server:
    """Milvus, as root; a client knows one database."""

    def __init__(self) -> None:
        logins = kept()
        if not logins:
            raise Failed("only root can do this, after a deploy has made Milvus")
        self.uri, self.password = logins["uri"], logins["password"]

    def of(self, database: str) -> Any:
        try:
            return connect(self.uri, "root", self.password, database)
        except Exception as error:
            raise Failed(f"Milvus at {self.uri}: {words(error)}") from None


def back_up(store: Store, server: Server) -> dict[str, Any]:
    """All collections of all databases."""
    with store.alone():
        name = store.new()
        root = server.of("default")
        content: dict[str, Any] = {"format": 1, "server": root.get_server_version(), "collections": {}}
        try:
            for database in sorted(root.list_databases()):
                client = server.of(database)
                for collection in sorted(client.list_collections()):
                    label = f"{database}/{collection}"
                    folder = store.path(f"{name}.new", database, collection)
                    os.makedirs(folder, 0o700)
                    try:
                        content["collections"][label] = found = saved(client, collection, folder)
                    except (OSError, Failed) as error:
                        raise Failed(f"{label}: {error}") from None
                    except Exception as error:
                        raise Failed(f"{label}: {words(error)}") from None
                    print(f"{label}: {found['rows']} rows", flush=True)
        except BaseException:
            shutil.rmtree(store.path(f"{name}.new"), ignore_errors=True)
            raise
        gone = store.done(name, content)
    for each in gone:
        print(f"backup {each} removed: {store.keep} are kept", flush=True)
    return {**content, "name": name}


def saved(client: Any, collection: str, folder: str) -> dict[str, Any]:
    """Write one collection; what has to be known of it to make it again, and to see whether it is the same."""
    shape = described(client, collection)
    if shape["functions"]:
        raise Failed(f"its functions ({', '.join(shape['functions'])}) can't be made again by gpulab")
    kinds = {field["name"]: field["type"] for field in shape["fields"]}
    files: dict[str, Any] = {}
    samples: list[Any] = []
    with in_memory(client, collection, shape):
        for number, partition in enumerate(shape["partitions"] or [None]):
            path = f"rows-{number:04}.jsonl.gz"

            def rows(partition: str | None = partition) -> Iterator[dict[str, Any]]:
                for batch in batches(client, collection, shape, partition):
                    if len(samples) < SEARCHES:
                        samples.append(batch[0])
                    yield from batch

            files[path] = {**write(os.path.join(folder, path), rows(), kinds), "partition": partition}
        searches = [
            found for index in shape["indexes"] if (found := searched(client, collection, shape, index, samples))
        ]
    return {**shape, "rows": sum(each["rows"] for each in files.values()), "files": files, "searches": searches}


def described(client: Any, collection: str) -> dict[str, Any]:
    """Its shape: what `made` makes again."""
    found = client.describe_collection(collection)
    fields = []
    for each in found["fields"]:
        field = {
            "name": each["name"],
            "type": each["type"].name,
            "params": dict((each.get("params") or {}).items()),
            "description": each.get("description", ""),
        }
        field |= {key: True for key in ("is_primary", "auto_id", "is_partition_key", "nullable") if each.get(key)}
        if getattr(each.get("element_type"), "name", "NONE") not in ("NONE", "UNKNOWN"):
            field["element_type"] = each["element_type"].name
        fields.append(field)
    indexes = []
    for name in sorted(client.list_indexes(collection)):
        index = {key: str(value) for key, value in (client.describe_index(collection, name) or {}).items()}
        params = {key: value for key, value in index.items() if key not in ABOUT and key != "state"}
        known = {key: index[key] for key in ("field_name", "index_name", "index_type", "metric_type") if key in index}
        indexes.append({**known, "params": params})
    by_key = any(field.get("is_partition_key") for field in fields)
    aliases: list[str] = []
    # Older servers have no list of aliases.
    with contextlib.suppress(Exception):
        aliases = list(client.list_aliases(collection)["aliases"])
    return {
        "fields": fields,
        "auto_id": bool(found.get("auto_id")),
        "dynamic": bool(found.get("enable_dynamic_field")),
        "description": found.get("description", ""),
        "shards": int(found.get("num_shards") or 1),
        "consistency": found.get("consistency_level_name") or "Bounded",
        "functions": [each.get("name", "?") for each in found.get("functions") or []],
        # With a key, the server spreads the rows by itself.
        "partitions": [] if by_key else sorted(client.list_partitions(collection)),
        "by_key": by_key,
        "indexes": indexes,
        "aliases": aliases,
        "loaded": is_loaded(client, collection),
    }


@contextlib.contextmanager
def in_memory(client: Any, collection: str, shape: dict[str, Any]) -> Iterator[None]:
    """Rows can be read of a collection in memory alone, which needs an index; afterwards it is as it was."""
    bare = not any(index["field_name"] in vectors(shape) for index in shape["indexes"])
    name = "gpulab_reading"
    if bare:
        params = client.prepare_index_params()
        for field in vectors(shape):
            binary = kind_of(shape, field) == "BINARY_VECTOR"
            kind, metric = ("BIN_FLAT", "HAMMING") if binary else ("FLAT", "L2")
            params.add_index(field, index_type=kind, metric_type=metric, index_name=f"{name}_{field}", params={})
        client.create_index(collection, params)
    if not shape["loaded"]:
        client.load_collection(collection)
        wait_loaded(client, collection)
    try:
        yield
    finally:
        if not shape["loaded"]:
            client.release_collection(collection)
        if bare:
            for field in vectors(shape):
                client.drop_index(collection, f"{name}_{field}")


def vectors(shape: dict[str, Any]) -> list[str]:
    return [field["name"] for field in shape["fields"] if field["type"].endswith("_VECTOR")]


def kind_of(shape: dict[str, Any], name: str) -> str:
    return next(str(field["type"]) for field in shape["fields"] if field["name"] == name)


def is_loaded(client: Any, collection: str) -> bool:
    return str(getattr(client.get_load_state(collection)["state"], "name", "")) == "Loaded"


def wait_loaded(client: Any, collection: str) -> None:
    deadline = time.monotonic() + LOAD_S
    while not is_loaded(client, collection):
        if time.monotonic() >= deadline:
            raise Failed(f"{collection} is not in memory after {LOAD_S} s")
        time.sleep(0.5)


def batch_rows(shape: dict[str, Any]) -> int:
    """Rows of a request: fewer of them where they are large."""
    size = sum(4 * int(field["params"].get("dim", 256)) for field in shape["fields"])
    return max(1, min(BATCH_ROWS, BATCH_BYTES // size))


def batches(
    client: Any, collection: str, shape: dict[str, Any], partition: str | None
) -> Iterator[list[dict[str, Any]]]:
    iterator = client.query_iterator(
        collection,
        batch_size=batch_rows(shape),
        output_fields=["*"],
        partition_names=[partition] if partition else None,
        consistency_level="Strong",
    )
    try:
        while batch := iterator.next():
            yield [dict(row) for row in batch]
    finally:
        iterator.close()


def counted(client: Any, collection: str) -> int:
    """Rows, those written a moment ago included."""
    found = client.query(collection, filter="", output_fields=["count(*)"], consistency_level="Strong")
    return int(found[0]["count(*)"])


def searched(
    client: Any, collection: str, shape: dict[str, Any], index: dict[str, Any], samples: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What searches with some of its own vectors find, looked for as widely as the index can; None: no numbers."""
    field = index["field_name"]
    if kind_of(shape, field) != "FLOAT_VECTOR":
        return None
    asked = [[float(number) for number in row[field]] for row in samples if row.get(field) is not None]
    if not asked:
        return None
    return {
        "field": field,
        "metric": index["metric_type"],
        "vectors": asked,
        "found": answers(client, collection, shape, index, asked),
    }


def answers(
    client: Any, collection: str, shape: dict[str, Any], index: dict[str, Any], asked: list[list[float]]
) -> list[list[list[Any]]]:
    """For each vector, id and distance of its neighbours, closest first."""
    key = next(field["name"] for field in shape["fields"] if field.get("is_primary"))
    found = client.search(
        collection,
        data=asked,
        anns_field=index["field_name"],
        limit=NEIGHBOURS,
        search_params={"metric_type": index["metric_type"], "params": widest(index)},
        consistency_level="Strong",
    )
    return [[[hit["id"] if "id" in hit else hit[key], float(hit["distance"])] for hit in hits] for hits in found]


def widest(index: dict[str, Any]) -> dict[str, Any]:
    """The parameters with which a search misses the least."""
    kind, params = index["index_type"], index["params"]
    if "IVF" in kind or kind == "SCANN":
        return {"nprobe": int(params.get("nlist", 128))}
    if kind == "GPU_CAGRA" and str(params.get("adapt_for_cpu")).lower() != "true":
        return {"itopk_size": 256}
    return {"ef": 2048} if kind in ("HNSW", "GPU_CAGRA") else {}


def restore(store: Store, server: Server, chosen: list[str], name: str, into: str, replace: bool) -> None:
    """Make collections again from a backup. What is there is never written to, and never removed."""
    with store.alone():
        content = store.content(name)
        known = content["collections"]
        for label in chosen:
            if label not in known:
                raise Failed(f"backup {content['name']} has no {label}; it has {', '.join(known) or 'no collection'}")
        for label in chosen:
            database, _, collection = label.partition("/")
            target = into or collection
            folder = store.path(content["name"], database, collection)
            for path, written in known[label]["files"].items():
                check(os.path.join(folder, path), written)
            if database not in server.of("default").list_databases():
                server.of("default").create_database(database)
            try:
                restored(server.of(database), known[label], folder, target, replace)
            except Failed as failed:
                raise Failed(f"{label}: {failed}") from None
            except Exception as error:
                raise Failed(f"{label}: {words(error)}") from None
            print(f"{database}/{target}: {known[label]['rows']} rows of {content['name']}", flush=True)


def restored(client: Any, shape: dict[str, Any], folder: str, target: str, replace: bool) -> None:
    """Fill another collection, count, and only then let it have the name."""
    scratch, aside = f"{target}_gpulab_restoring", f"{target}_before_restore"
    there = set(client.list_collections())
    if target in there and not replace:
        raise Failed(f"{target} is there; --into NAME restores beside it, --replace sets it aside as {aside}")
    if target in there and aside in there:
        raise Failed(f"{aside} is there from an earlier restore; drop it once it is not needed any more")
    if scratch in there:
        client.drop_collection(scratch)
    made(client, shape, scratch)
    kinds = {field["name"]: field["type"] for field in shape["fields"]}
    generated = {
        field["name"]
        for field in shape["fields"]
        if field.get("auto_id") or (field.get("is_primary") and shape["auto_id"])
    }
    for path, written in shape["files"].items():
        batch: list[dict[str, Any]] = []
        for row in read(os.path.join(folder, path), kinds):
            batch.append({key: typed(value, kinds.get(key, "")) for key, value in row.items() if key not in generated})
            if len(batch) == batch_rows(shape):
                put(client, scratch, batch, written["partition"])
                batch = []
        if batch:
            put(client, scratch, batch, written["partition"])
    client.flush(scratch)
    with in_memory(client, scratch, {**shape, "loaded": False}):
        count = counted(client, scratch)
    if count != shape["rows"]:
        raise Failed(f"{scratch} has {count} rows, expected {shape['rows']}; it is left as it is")
    if target in there:
        client.rename_collection(target, aside)
        print(f"what was there is {aside} now", flush=True)
    client.rename_collection(scratch, target)
    if generated:
        print(f"{target}: its ids are the server's own, and new", flush=True)
    if shape["loaded"]:
        client.load_collection(target)
        wait_loaded(client, target)
    for alias in shape["aliases"]:
        with contextlib.suppress(Exception):
            # It may still point to what was there.
            client.create_alias(target, alias)


def typed(value: Any, kind: str) -> Any:
    """Vectors of small integers are taken as arrays alone."""
    if kind != "INT8_VECTOR" or value is None:
        return value
    import numpy

    return numpy.frombuffer(value, dtype=numpy.int8)


def put(client: Any, collection: str, rows: list[dict[str, Any]], partition: str | None) -> None:
    client.insert(collection, rows, **({"partition_name": partition} if partition else {}))


def made(client: Any, shape: dict[str, Any], name: str) -> None:
    """An empty collection of that shape, with its partitions and indexes."""
    from pymilvus import DataType

    schema = client.create_schema(
        auto_id=shape["auto_id"], enable_dynamic_field=shape["dynamic"], description=shape["description"]
    )
    for field in shape["fields"]:
        flags = {key: True for key in ("is_primary", "auto_id", "is_partition_key", "nullable") if field.get(key)}
        if "element_type" in field:
            flags["element_type"] = DataType[field["element_type"]]
        kind = DataType[field["type"]]
        schema.add_field(field["name"], kind, description=field["description"], **flags, **field["params"])
    client.create_collection(name, schema=schema, num_shards=shape["shards"], consistency_level=shape["consistency"])
    for partition in shape["partitions"]:
        if not client.has_partition(name, partition):
            client.create_partition(name, partition)
    if shape["indexes"]:
        params = client.prepare_index_params()
        for index in shape["indexes"]:
            params.add_index(**index)
        client.create_index(name, params)


def compare(store: Store, server: Server, name: str) -> list[str]:
    """How collections answer otherwise than in a backup, a line each."""
    content = store.content(name)
    found, rows = [], 0
    for label, before in content["collections"].items():
        database, _, collection = label.partition("/")
        try:
            found += [f"{label}: {line}" for line in differing(server.of(database), collection, before)]
        except Failed as failed:
            found.append(f"{label}: {failed}")
        except Exception as error:
            found.append(f"{label}: {words(error)}")
        rows += before["rows"]
    version = server.of("default").get_server_version()
    if not found:
        print(
            f"{len(content['collections'])} collections with {rows} rows answer as in backup {content['name']} "
            f"({content['server']} -> {version})"
        )
    return found


def differing(client: Any, collection: str, before: dict[str, Any]) -> list[str]:
    if not client.has_collection(collection):
        return ["it is gone"]
    if not before["loaded"]:
        return []
    wait_loaded(client, collection)
    found = []
    if (count := counted(client, collection)) < before["rows"]:
        found.append(f"{count} rows, expected at least {before['rows']}")
    now = {index["field_name"]: index for index in described(client, collection)["indexes"]}
    for search in before["searches"]:
        index = now.get(search["field"])
        if index is None:
            found.append(f"{search['field']} has no index any more")
            continue
        answered = answers(client, collection, before, index, search["vectors"])
        pairs = list(zip(search["found"], answered, strict=True))
        missed = sum(len(lost(was, is_now, search["metric"] in ("L2", "HAMMING", "JACCARD"))) for was, is_now in pairs)
        total = sum(len(was) for was in search["found"])
        if total and missed > (1 - RECALL) * total:
            found.append(f"{missed} of {total} neighbours by {search['field']} are not found any more")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="gpulab-milvus", description="Backups of Milvus' collections.")
    commands = made.add_subparsers(dest="do", required=True)
    commands.add_parser("backup", help="write all collections of all databases")
    listing = commands.add_parser("list", help="what backups there are")
    listing.add_argument("--json", action="store_true", help="for programs")
    again = commands.add_parser("restore", help="make collections again")
    again.add_argument("collections", nargs="+", metavar="DATABASE/COLLECTION")
    again.add_argument("--into", default="", metavar="NAME", help="under another name, beside the one that is there")
    again.add_argument("--replace", action="store_true", help="set the one that is there aside")
    other = commands.add_parser("compare", help="do the collections answer as when they were backed up?")
    for each in (again, other):
        each.add_argument("--backup", default="latest", metavar="TIME", help="one of `list`; the latest")
    return made


def listed(store: Store, as_json: bool) -> None:
    contents = [store.content(name) for name in store.names()]
    if as_json:
        short = {
            each["name"]: {
                "server": each["server"],
                "collections": {label: found["rows"] for label, found in each["collections"].items()},
            }
            for each in contents
        }
        print(json.dumps(short))
        return
    for each in contents:
        print(f"{each['name']}  Milvus {each['server']}")
        for label, found in each["collections"].items():
            print(f"    {label}: {found['rows']} rows")


def main() -> int:
    asked = parser().parse_args()
    try:
        with open(SETTINGS) as file:
            settings = json.load(file)
        store = Store(settings["folder"], settings["keep"])
        if asked.do == "list":
            listed(store, asked.json)
        elif asked.do == "backup":
            print(f"backup {back_up(store, Server())['name']} in {store.folder}")
        elif asked.do == "restore":
            if asked.into and len(asked.collections) > 1:
                raise Failed("--into names one collection")
            restore(store, Server(), asked.collections, asked.backup, asked.into, asked.replace)
        elif lines := compare(store, Server(), asked.backup):
            raise Failed("collections answer otherwise than before:\n" + "\n".join(lines))
    except (Failed, Broken, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

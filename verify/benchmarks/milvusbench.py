# SPDX-License-Identifier: MIT
"""How fast Milvus indexes and searches, as its first declared collection is declared, and how much of it it finds.

Runs on the guest, as root, with Milvus' driver: see docs/benchmarks.md, "Milvus". All of it happens in a
database of its own, which is gone afterwards; one that a killed run left is removed first. Prints one JSON object on
stdout and progress on stderr. Root's password comes over stdin, as `{"root": PASSWORD}`.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verify.benchmarks.host import device, entry, in_use, nvml_from, others, report, ruled, say
from verify.benchmarks.intervals import stop

#: A Python with Milvus' driver, where this one has none.
TOOLS = "/opt/gpulab/milvus-tools/bin/python"
DATABASE, COLLECTION, FIELD = "gpulab_bench", "bench", "vector"
#: How well a median is to be known, as a share of it, before sampling ends.
NOISE = {"milvus.build": 0.10, "milvus.recall": 0.01, "milvus.qps.1": 0.05, "milvus.qps.8": 0.05}
UNIT = {"milvus.build": "vectors/s", "milvus.recall": "ratio", "milvus.qps.1": "queries/s", "milvus.qps.8": "queries/s"}
#: Neighbours that a search asks for, and the vectors' seed: the same ones each time, so that recall is comparable.
TOP_K, SEED = 10, 1
#: Samples of each metric at least: with fewer, 95 % say nothing of a median.
LEAST = 6
#: Vectors are at most so many bytes in all, so that they are one segment: Milvus indexes segments, and none below 1024
#: rows.
MOST_BYTES, LEAST_ROWS = 64 << 20, 2048
#: Bytes of one insert. The server takes 64 MiB, newer ones less.
INSERT_BYTES = 8 << 20
#: Queries of one sample of recall, one request.
BATCH = 50
#: Distances may differ from this program's by so much of the vectors' own size: 32-bit sums in whatever order.
TOLERANCE = 1e-3
#: Seconds for one answer, and between two looks at what the server does by and by.
CALL_S, LOOK_S = 30.0, 0.01
#: Seconds beside those of sampling, twice: to fill, index, load. Seconds of them to remove the database.
AROUND_S, CLEAN_S = 40.0, 10.0
#: Milvus' own clock of what an index takes, seconds (its name is that of the first versions), and how many it built.
BUILT = "milvus_indexnode_knowhere_build_index_latency"
#: Protocol: no waiting for what was written later than the collection was loaded; whole numbers; vectors of float32.
EVENTUALLY, INT64, FLOAT_VECTOR = 3, 5, 101
SEARCH = "/milvus.proto.milvus.MilvusService/Search"


@dataclass(frozen=True)
class Sizes:
    """Vectors, share of the seconds of sampling for each metric, and searches of each client in a sample, by number of
    clients.
    """

    rows: int
    share: float
    searches: dict[int, int]


SIZES = {
    "cpu": Sizes(4000, 0.04, {1: 100, 8: 25}),
    "cuda": Sizes(100_000, 0.1, {1: 200, 8: 50}),
}


class NoAnswer(Exception):
    """Milvus said no, or nothing. `status`: gRPC's own in words, `REFUSED` where Milvus answered with an error."""

    def __init__(self, status: str, said: str) -> None:
        super().__init__(said or status)
        self.status = status


class Impossible(Exception):
    """There is nothing to measure here; not a failure of what is measured."""


class Ended(BaseException):
    """A signal ends the run."""


class Client:
    """Milvus' gRPC API on the guest's loopback address, as root."""

    def __init__(self, port: int, password: str, deadline: float) -> None:
        import grpc
        from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc, schema_pb2

        self.api, self.common, self.schema = milvus_pb2, common_pb2, schema_pb2
        self.deadline = deadline
        self._grpc, self._port = grpc, port
        self._login = base64.b64encode(f"root:{password}".encode()).decode()
        self._channel = self._connection()
        self._stub = milvus_pb2_grpc.MilvusServiceStub(self._channel)

    def _connection(self) -> Any:
        # The guest may have a proxy in its environment; loopback is never behind it. Channels otherwise share one
        # connection.
        options = [
            ("grpc.enable_http_proxy", 0),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
        ]
        return self._grpc.insecure_channel(f"127.0.0.1:{self._port}", options=options)

    def metadata(self, database: str) -> list[tuple[str, str]]:
        return [("authorization", self._login), *([("dbname", database)] if database else [])]

    def ask(self, request: Any, database: str = DATABASE) -> Any:
        """The answer; the call is named as its request. Told to go slower (a limit of rates), it asks again.

        Raises:
            NoAnswer: there is none, or a refusal.
        """
        call = getattr(self._stub, type(request).__name__.removesuffix("Request"))
        while True:
            limit_s = min(CALL_S, max(self.deadline - time.monotonic(), 1.0))
            try:
                answer = call(request, metadata=self.metadata(database), timeout=limit_s)
            except self._grpc.RpcError as error:
                raise NoAnswer(error.code().name, str(error.details())[:300]) from None
            told = getattr(answer, "status", answer)
            if not (told.code or told.error_code):
                return answer
            if "rate limit" not in told.reason.lower() or time.monotonic() >= self.deadline:
                raise NoAnswer("REFUSED", told.reason[:300])
            time.sleep(0.5)

    @contextlib.contextmanager
    def searchers(self, count: int) -> Iterator[list[Callable[[bytes], bytes]]]:
        """Clients with a connection each, which send and return what is on the wire: their own work is not timed."""
        channels = [self._connection() for _ in range(count)]
        metadata = self.metadata(DATABASE)
        try:
            calls = [channel.unary_unary(SEARCH) for channel in channels]
            yield [functools.partial(call, metadata=metadata, timeout=CALL_S) for call in calls]
        finally:
            for channel in channels:
                channel.close()

    def words(self, error: BaseException) -> str:
        """What gRPC itself says, without the rest of its report."""
        return str(error.details())[:300] if isinstance(error, self._grpc.RpcError) else str(error)

    def close(self) -> None:
        self._channel.close()


class Data:
    """Vectors in clusters, as embeddings lie, and queries from the same; seeded. Noise alone has no neighbours worth
    the name, and an index's recall on it says nothing. For IP and COSINE all have length 1.
    """

    def __init__(self, rows: int, dimension: int, metric: str, seed: int) -> None:
        import numpy

        self.numpy: Any = numpy
        self.metric = metric
        self.rows, self.dimension = rows, dimension
        self.random = numpy.random.default_rng(seed)
        self.centres = self.random.standard_normal((clusters_of(rows), dimension), dtype=numpy.float32)
        self.vectors = self.drawn(rows)

    def drawn(self, count: int) -> Any:
        """More of them, float32."""
        numpy = self.numpy
        found: Any = self.centres[self.random.integers(len(self.centres), size=count)]
        found += 0.3 * self.random.standard_normal(found.shape, dtype=numpy.float32)
        if self.metric != "L2":
            found /= numpy.linalg.norm(found, axis=1, keepdims=True)
        return found

    def between(self, query: Any, ids: Any) -> Any:
        """What Milvus calls the distance: squared for L2, the product for the others."""
        numpy = self.numpy
        one, many = query.astype(numpy.float64), self.vectors[ids].astype(numpy.float64)
        if self.metric == "L2":
            return ((many - one) ** 2).sum(axis=1)
        return many @ one

    def size(self, query: Any, ids: Any) -> Any:
        """How large the numbers are that a distance is the sum of."""
        numpy = self.numpy
        if self.metric != "L2":
            return numpy.ones(len(ids))
        one, many = query.astype(numpy.float64), self.vectors[ids].astype(numpy.float64)
        return (one**2).sum() + (many**2).sum(axis=1)

    def nearest(self, queries: Any, count: int) -> list[set[int]]:
        """The ids of the true neighbours of each query: all are compared, the last of them in 64 bits."""
        numpy = self.numpy
        scores = queries @ self.vectors.T
        scores = (self.vectors**2).sum(axis=1) - 2 * scores if self.metric == "L2" else -scores
        found = []
        few = min(4 * count, self.rows)
        for query, row in zip(queries, scores, strict=True):
            ids = numpy.argpartition(row, few - 1)[:few]
            exact = self.between(query, ids)
            order = numpy.argsort(exact if self.metric == "L2" else -exact)[:count]
            found.append({int(each) for each in ids[order]})
        return found


def rows_of(kind: str, dimension: int) -> int:
    """How many vectors: those of the sizes, or as many as memory allows; so many that Milvus indexes them at least."""
    return max(min(SIZES[kind].rows, MOST_BYTES // (4 * dimension)), LEAST_ROWS)


def setting_of(order: dict[str, Any], kind: str, seed: int) -> str:
    """All that figures are comparable only with, but for who timed the builds."""
    index = {key: value for key, value in order["index"].items() if key not in ("index_type", "metric_type")}
    words = [f"{key} {value}" for key, value in [*sorted(index.items()), *sorted(order["search"].items())]]
    rows = rows_of(kind, order["dimension"])
    samples = " and ".join(f"{clients} x {each}" for clients, each in SIZES[kind].searches.items())
    return ", ".join(
        [
            " ".join([order["index"]["index_type"], *words]),
            order["index"]["metric_type"],
            f"dimension {order['dimension']}",
            f"{rows} vectors in {clusters_of(rows)} clusters",
            f"seed {seed}",
            f"top {order.get('top_k', TOP_K)}",
            f"recall of {BATCH} queries a request",
            f"qps of 1 query a request, {samples} a sample",
        ]
    )


def clusters_of(rows: int) -> int:
    return max(rows // 100, 1)


class Bench:
    """One run: what it fills is `found`, the report."""

    def __init__(self, client: Client, order: dict[str, Any], data: Data, found: dict[str, Any]) -> None:
        self.client, self.data, self.found = client, data, found
        self.index, self.params, self.top_k = order["index"], order["search"], order.get("top_k", TOP_K)
        self.metrics_port = order.get("metrics_port")
        self.sizes = SIZES[found["device"]]
        self.sampling_s = self.sizes.share * float(order["limit_s"])
        self.own_clock = False
        self.wrong: dict[str, list[str]] = {}

    def run(self) -> None:
        """
        Raises:
            NoAnswer: Milvus refuses, or is gone.
            Impossible: it knows no such index.
        """
        self.fill()
        outside, own = self.build()
        if self.found["device"] == "cuda" and self.found["card"] is None:
            raise Impossible("the index is one of the GPU, and NVML knows no card")
        self.own_clock = own is not None and 0 < own <= outside
        by = "Milvus" if self.own_clock else "its client, in steps of Milvus' scheduler"
        self.found["setting"] += f", builds timed by {by}"
        self.sample("milvus.build", self.built)
        self.load()
        self.recall()
        for clients, each in self.sizes.searches.items():
            self.qps(clients, each)

    def fill(self) -> None:
        """The database, its collection, the vectors, all of them in storage."""
        api, schema, common, ask = self.client.api, self.client.schema, self.client.common, self.client.ask
        ask(api.CreateDatabaseRequest(db_name=DATABASE), "")
        dimension = common.KeyValuePair(key="dim", value=str(self.data.dimension))
        fields = [
            schema.FieldSchema(name="id", is_primary_key=True, data_type=INT64),
            schema.FieldSchema(name=FIELD, data_type=FLOAT_VECTOR, type_params=[dimension]),
        ]
        made = schema.CollectionSchema(name=COLLECTION, fields=fields).SerializeToString()
        ask(
            api.CreateCollectionRequest(
                collection_name=COLLECTION, schema=made, shards_num=1, consistency_level=EVENTUALLY
            )
        )
        each = max(INSERT_BYTES // (4 * self.data.dimension), 1)
        for begin in range(0, self.data.rows, each):
            ask(self.insert(begin, self.data.vectors[begin : begin + each]))
        flushed = ask(api.FlushRequest(collection_names=[COLLECTION]))
        wanted = api.GetFlushStateRequest(
            segmentIDs=flushed.coll_segIDs[COLLECTION].data,
            flush_ts=flushed.coll_flush_ts[COLLECTION],
            collection_name=COLLECTION,
        )
        self.until("the vectors are in storage", lambda: ask(wanted).flushed)
        say("filled")

    def insert(self, begin: int, vectors: Any) -> Any:
        schema = self.client.schema
        ids = schema.FieldData(type=INT64, field_name="id")
        ids.scalars.long_data.data.extend(range(begin, begin + len(vectors)))
        values = schema.FieldData(type=FLOAT_VECTOR, field_name=FIELD)
        values.vectors.dim = self.data.dimension
        values.vectors.float_vector.data.extend(vectors.ravel().tolist())
        return self.client.api.InsertRequest(
            collection_name=COLLECTION, fields_data=[ids, values], num_rows=len(vectors)
        )

    def built(self) -> float | None:
        """Vectors a second; None: others' indexes were built meanwhile."""
        outside, own = self.build()
        seconds = own if self.own_clock else outside
        return None if seconds is None else self.data.rows / seconds

    def build(self) -> tuple[float, float | None]:
        """Seconds from the order to build the index until all vectors are in it, and of them those that the building
        took, as Milvus itself says: its scheduler looks once a second. None: it does not say, or built another as well.

        The index before is dropped first.
        """
        api, common, ask = self.client.api, self.client.common, self.client.ask
        ask(api.DropIndexRequest(collection_name=COLLECTION, field_name=FIELD, index_name=FIELD))
        params = {key: value for key, value in self.index.items() if key not in ("index_type", "metric_type")}
        words = {
            "index_type": self.index["index_type"],
            "metric_type": self.index["metric_type"],
            "params": json.dumps(params),
        }
        pairs = [common.KeyValuePair(key=key, value=value) for key, value in words.items()]
        request = api.CreateIndexRequest(
            collection_name=COLLECTION, field_name=FIELD, index_name=FIELD, extra_params=pairs
        )
        before = builds(self.metrics_port)
        began = time.monotonic()
        try:
            ask(request)
        except NoAnswer as refused:
            if refused.status != "REFUSED":
                raise
            raise Impossible(f"Milvus refuses the index: {refused}") from None
        self.until("the index is built", self.indexed)
        outside = time.monotonic() - began
        after = builds(self.metrics_port)
        if before is None or after is None or after[0] != before[0] + 1:
            return outside, None
        return outside, after[1] - before[1]

    def indexed(self) -> bool:
        """Milvus says first that nothing is to be done, before it has found the segments: rows are what counts."""
        api = self.client.api
        answer = self.client.ask(api.DescribeIndexRequest(collection_name=COLLECTION, field_name=FIELD))
        for each in answer.index_descriptions:
            if each.index_state_fail_reason:
                raise NoAnswer("REFUSED", f"the index failed: {each.index_state_fail_reason[:300]}")
        rows = [(each.indexed_rows, each.pending_index_rows) for each in answer.index_descriptions]
        return bool(rows) and all(done >= self.data.rows and not pending for done, pending in rows)

    def load(self) -> None:
        """Into memory, and every vector is there."""
        api, ask = self.client.api, self.client.ask
        ask(api.LoadCollectionRequest(collection_name=COLLECTION, replica_number=1))
        progress = api.GetLoadingProgressRequest(collection_name=COLLECTION)
        self.until("the collection is loaded", lambda: ask(progress).progress >= 100)
        counted = ask(api.QueryRequest(collection_name=COLLECTION, output_fields=["count(*)"]))
        rows = counted.fields_data[0].scalars.long_data.data[0] if counted.fields_data else 0
        if rows != self.data.rows:
            self.mistake("milvus.build", f"Milvus has {rows} rows of {self.data.rows}")
        say("loaded")

    def recall(self) -> None:
        """How many of the true neighbours a search finds; a sample is a request with queries never asked before."""
        with self.client.searchers(1) as (search,):

            def batch() -> float:
                queries = self.data.drawn(BATCH)
                answers = self.answered("milvus.recall", queries, self.asked(search, self.request(queries)))
                true = self.data.nearest(queries, self.top_k)
                hits = sum(len(wanted & set(got)) for wanted, got in zip(true, answers, strict=True))
                return hits / (self.top_k * BATCH)

            batch()
            self.sample("milvus.recall", batch)

    def qps(self, clients: int, each: int) -> None:
        """Searches a second of so many clients at the same time, each with its own connection and queries."""
        name = f"milvus.qps.{clients}"
        queries = [self.data.drawn(each) for _ in range(clients)]
        requests = [[self.request(query[None, :]) for query in own] for own in queries]
        with self.client.searchers(clients) as searchers:

            def all_of(search: Callable[[bytes], bytes], own: Sequence[bytes]) -> list[bytes]:
                return [self.asked(search, request) for request in own]

            def searched() -> float:
                works = [functools.partial(all_of, *each) for each in zip(searchers, requests, strict=True)]
                answers, seconds = at_once(works)
                for own, told in zip(queries, answers, strict=True):
                    for query, answer in zip(own, told, strict=True):
                        self.answered(name, query[None, :], answer)
                return clients * each / seconds

            searched()
            self.sample(name, searched)

    def request(self, queries: Any) -> bytes:
        """A search for these vectors, as it goes over the wire."""
        common = self.client.common
        holder = common.PlaceholderValue(tag="$0", type=FLOAT_VECTOR, values=[each.tobytes() for each in queries])
        words = {
            "anns_field": FIELD,
            "topk": str(self.top_k),
            "metric_type": self.index["metric_type"],
            "params": json.dumps(self.params),
            "round_decimal": "-1",
        }
        wanted = self.client.api.SearchRequest(
            collection_name=COLLECTION,
            placeholder_group=common.PlaceholderGroup(placeholders=[holder]).SerializeToString(),
            dsl_type=common.DslType.BoolExprV1,
            nq=len(queries),
            search_params=[common.KeyValuePair(key=key, value=value) for key, value in words.items()],
            consistency_level=EVENTUALLY,
        )
        made: bytes = wanted.SerializeToString()
        return made

    def asked(self, search: Callable[[bytes], bytes], request: bytes) -> bytes:
        try:
            return search(request)
        except self.client._grpc.RpcError as error:
            raise NoAnswer(error.code().name, self.client.words(error)) from None

    def answered(self, name: str, queries: Any, raw: bytes) -> list[list[int]]:
        """The ids found for each query, after a look at whether they can be right.

        Raises:
            NoAnswer: a refusal.
        """
        answer = self.client.api.SearchResults.FromString(raw)
        if answer.status.code or answer.status.error_code:
            raise NoAnswer("REFUSED", answer.status.reason[:300])
        counts = list(answer.results.topks)
        if len(counts) != len(queries):
            raise NoAnswer("REFUSED", f"{len(counts)} results for {len(queries)} queries")
        found, at = [], 0
        for query, count in zip(queries, counts, strict=True):
            ids = list(answer.results.ids.int_id.data[at : at + count])
            scores = list(answer.results.scores[at : at + count])
            at += count
            if words := self.impossible(query, ids, scores):
                self.mistake(name, words)
            found.append(ids)
        return found

    def impossible(self, query: Any, ids: Sequence[int], scores: Sequence[float]) -> str:
        """Why this cannot be the answer; empty: it can."""
        if len(ids) != self.top_k or len(set(ids)) != self.top_k:
            return f"a search found {len(set(ids))} vectors where {self.top_k} are asked for"
        if strange := [each for each in ids if not 0 <= each < self.data.rows]:
            return f"a search found vector {strange[0]}, which nobody inserted"
        numpy = self.data.numpy
        known = self.data.between(query, ids)
        off = numpy.abs(numpy.array(scores) - known) > TOLERANCE * self.data.size(query, ids)
        if off.any():
            first = int(off.argmax())
            return f"vector {ids[first]} at distance {scores[first]:.6g}, which is {known[first]:.6g}"
        return ""

    def mistake(self, name: str, words: str) -> None:
        self.wrong.setdefault(name, []).append(words)

    def sample(self, name: str, measure: Callable[[], float | None]) -> None:
        """The metric's samples; those that there are when something breaks stay."""
        samples: list[float] = []
        dropped, began = 0, time.monotonic()
        try:
            while time.monotonic() < self.client.deadline and (
                len(samples) < LEAST
                or not stop(samples, noise=NOISE[name], elapsed_s=time.monotonic() - began, limit_s=self.sampling_s)
            ):
                if (value := measure()) is None:
                    dropped += 1
                else:
                    samples.append(value)
        finally:
            if dropped:
                self.found["notes"].append(f"{name}: {dropped} samples dropped, others' indexes were built meanwhile")
            if samples:
                self.found["metrics"][name] = entry(UNIT[name], samples, len(self.wrong.get(name, [])))
                say(f"{name}: {sorted(samples)[len(samples) // 2]:.5g} {UNIT[name]}, {len(samples)} samples")

    def until(self, what: str, done: Callable[[], bool]) -> None:
        while not done():
            if time.monotonic() >= self.client.deadline:
                raise NoAnswer("DEADLINE_EXCEEDED", f"the time is up before {what}")
            time.sleep(LOOK_S)


def builds(port: int | None) -> tuple[int, float] | None:
    """How many indexes Milvus has built since it started, and the seconds they took; None: it does not say."""
    if port is None:
        return None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=CALL_S) as answer:
            lines = answer.read().decode(errors="replace").splitlines()
    except (OSError, ValueError):
        return None
    return built_of(lines)


def built_of(lines: Sequence[str]) -> tuple[int, float] | None:
    """The same of the lines of its metrics. Before the first build there are none, and with several nodes several."""
    words = [line.rpartition(" ") for line in lines if line.startswith(BUILT)]
    counts = [float(value) for name, _, value in words if name.partition("{")[0] == f"{BUILT}_count"]
    sums = [float(value) for name, _, value in words if name.partition("{")[0] == f"{BUILT}_sum"]
    return int(sum(counts)), sum(sums)


def at_once(works: Sequence[Callable[[], Any]]) -> tuple[list[Any], float]:
    """Work in threads that begin together: what each gave, and the seconds until the last had ended."""
    results: list[Any] = [None] * len(works)
    gate = threading.Barrier(len(works) + 1)

    def one(place: int) -> None:
        gate.wait()
        try:
            results[place] = works[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=one, args=(place,), daemon=True) for place in range(len(works))]
    for thread in threads:
        thread.start()
    gate.wait()
    began = time.monotonic()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results, seconds


def clean(client: Client) -> None:
    """Nothing of a benchmark is left, whatever was there.

    Raises:
        NoAnswer: Milvus does not let it go.
    """
    api = client.api
    if DATABASE not in client.ask(api.ListDatabasesRequest(), "").db_names:
        return
    for name in client.ask(api.ShowCollectionsRequest(), DATABASE).collection_names:
        client.ask(api.ReleaseCollectionRequest(collection_name=name))
        client.ask(api.DropCollectionRequest(collection_name=name))
    while True:
        try:
            client.ask(api.DropDatabaseRequest(db_name=DATABASE), "")
            return
        except NoAnswer as refused:
            # What is dropped takes a moment to be gone.
            if refused.status != "REFUSED" or time.monotonic() >= client.deadline:
                raise
            time.sleep(0.2)


def version_of(client: Client) -> str:
    """
    Raises:
        Impossible: nobody answers, or root is not let in.
    """
    try:
        client.ask(client.api.ListDatabasesRequest(), "")
        return str(client.ask(client.api.GetVersionRequest(), "").version)
    except NoAnswer as none:
        if none.status in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "auth" in str(none).lower():
            raise Impossible(f"Milvus refuses root's login: {none}") from None
        raise Impossible(f"Milvus does not answer: {none}") from None


def measured(order: dict[str, Any], password: str | None) -> dict[str, Any]:
    """The report: `order` has `port`, `metrics_port`, `index` (all of it, in Milvus' own words), `search` (its
    parameters), `dimension`, `containers`, `limit_s` of sampling, the `folder` of pynvml where Python has none,
    and may have `top_k` and `seed`.
    """
    began = time.monotonic()
    if "folder" in order:
        nvml_from(order["folder"])
    seed = int(order.get("seed", SEED))
    kind = "cuda" if order["index"]["index_type"].startswith("GPU_") else "cpu"
    found = report("milvus", software="milvus", setting=setting_of(order, kind, seed))
    found |= {**device(kind), "seed": seed}
    client: Client | None = None
    try:
        if password is None:
            raise Impossible("the lab has no password of root")
        client = Client(order["port"], password, began + 2 * float(order["limit_s"]) + AROUND_S - CLEAN_S)
        found["software"] = f"milvus {version_of(client)}"
        if kind == "cuda" and (users := others(order["containers"])):
            ruled(found, "inconclusive", in_use(users))
        else:
            clean(client)
            dimension, metric = order["dimension"], order["index"]["metric_type"]
            bench = Bench(client, order, Data(rows_of(kind, dimension), dimension, metric, seed), found)
            bench.run()
            if wrong := [words for each in bench.wrong.values() for words in each]:
                for name, metric in found["metrics"].items():
                    metric["wrong"] = len(bench.wrong.get(name, []))
                ruled(found, "failed", f"{len(wrong)} answers are wrong: {wrong[0]}")
            elif kind == "cuda" and (users := others(order["containers"])):
                ruled(found, "inconclusive", in_use(users))
    except ImportError as error:
        ruled(found, "not run", f"{TOOLS} has no driver of Milvus: {error}")
    except Impossible as error:
        ruled(found, "not run", str(error))
    except NoAnswer as error:
        ruled(found, "failed", f"{error.status}: {error}")
    except Ended as ended:
        ruled(found, "inconclusive", f"ended by {ended}")
    finally:
        if client is not None:
            leave(client, found)
    found["not_run"] = {name: found["reason"] or "the time is up" for name in UNIT if name not in found["metrics"]}
    if found["verdict"] == "measured" and found["not_run"]:
        ruled(found, "inconclusive", f"the time is up before {', '.join(found['not_run'])}")
    found["duration_s"] = time.monotonic() - began
    return found


def leave(client: Client, found: dict[str, Any]) -> None:
    """Remove what the run made. What stays is told, and is a failure."""
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    client.deadline = time.monotonic() + CLEAN_S
    try:
        # Who was never let in has made nothing.
        if found["software"] != "milvus":
            clean(client)
    except NoAnswer as error:
        reason = f"database {DATABASE} stays: {error}"
        ruled(found, "failed", f"{found['reason']}; {reason}" if found["reason"] else reason)
    client.close()


def ended(number: int, _: object) -> None:
    raise Ended(signal.Signals(number).name)


def main() -> None:
    try:
        import pymilvus  # noqa: F401
    except ImportError:
        if os.path.exists(TOOLS) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.dirname(TOOLS) + "/.."):
            os.execv(TOOLS, [TOOLS, *sys.orig_argv[1:]])
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, ended)
    print(json.dumps(measured(json.loads(sys.argv[1]), json.load(sys.stdin).get("root"))))


if __name__ == "__main__":
    main()

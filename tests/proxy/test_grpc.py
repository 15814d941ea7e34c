# SPDX-License-Identifier: MIT
"""gRPC over TLS through a real nginx: pymilvus as users have it, in front of a server that speaks a little of Milvus.

The server stands in for Milvus' own (tests/lab runs the real one): what is tried here is what nginx makes of gRPC.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from pymilvus import MilvusClient, MilvusException
from pymilvus.grpc_gen import common_pb2, milvus_pb2, milvus_pb2_grpc

from tests.proxy.real import ADDRESS, Guest, free_port, guest, proxy_of, served

PASSWORD = "Pass_word-of+astro/0123456789abcdef="


class Milvus(milvus_pb2_grpc.MilvusServiceServicer):
    """Some calls of Milvus. `seen`: the metadata of each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def _note(self, context: grpc.ServicerContext) -> None:
        self.seen.append(dict(context.invocation_metadata()))

    def Connect(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(context)
        return milvus_pb2.ConnectResponse(
            status=common_pb2.Status(), identifier=1, server_info=common_pb2.ServerInfo(build_tags="2.6.0")
        )

    def ShowCollections(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._note(context)
        return milvus_pb2.ShowCollectionsResponse(status=common_pb2.Status(), collection_names=["stars"])


class Streams(grpc.GenericRpcHandler):
    """`/test/Count`: five messages, each once the one before is `received`; `/test/Take`: the length of what it got."""

    def __init__(self) -> None:
        self.received = threading.Semaphore()

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method == "/test/Count":
            return grpc.unary_stream_rpc_method_handler(self.count)
        if details.method == "/test/Take":
            return grpc.unary_unary_rpc_method_handler(lambda request, _: str(len(request)).encode())
        return None

    def count(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        for number in range(5):
            if not self.received.acquire(timeout=10):
                context.abort(grpc.StatusCode.ABORTED, f"message {number} was held back")
            yield str(number + 1).encode()


@dataclass
class Site:
    guest: Guest
    port: int
    server: Milvus
    streams: Streams = field(default_factory=Streams)
    opened: list[MilvusClient] = field(default_factory=list)

    def client(self, password: str = PASSWORD, **keys: Any) -> MilvusClient:
        found = MilvusClient(
            uri=f"https://{ADDRESS}:{self.port}",
            token=f"astro:{password}",
            server_pem_path=str(self.guest.authority.certificate),
            timeout=5,
            **keys,
        )
        self.opened.append(found)
        return found

    def apply(self, **keys: Any) -> None:
        milvus = served("milvus", self.port, {"astro": [PASSWORD], "ml": ["password-of-ml"]})
        self.guest.apply(proxy_of(self.guest, milvus, **keys))


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    port, milvus = free_port(), Milvus()
    server = grpc.server(ThreadPoolExecutor(8))
    milvus_pb2_grpc.add_MilvusServiceServicer_to_server(milvus, server)
    streams = Streams()
    server.add_generic_rpc_handlers([streams])
    assert server.add_insecure_port(f"127.0.0.1:{port}") == port
    server.start()
    with guest(monkeypatch) as made:
        found = Site(made, port, milvus, streams)
        found.apply()
        yield found
        for client in found.opened:
            client.close()
    server.stop(0).wait()


def channel(site: Site) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(site.guest.authority.certificate.read_bytes())
    return grpc.secure_channel(f"{ADDRESS}:{site.port}", credentials)


def test_pymilvus_passes_and_the_log_knows_the_tenant(site: Site) -> None:
    assert site.client().list_collections() == ["stars"]

    # Milvus checks it: the header is passed on.
    assert all(seen["authorization"] for seen in site.server.seen)
    lines = site.guest.log()
    assert {line["tenant"] for line in lines} == {"astro"}
    assert lines[-1]["path"] == "/milvus.proto.milvus.MilvusService/ShowCollections"
    assert (lines[-1]["service"], lines[-1]["status"], lines[-1]["grpc_status"]) == ("milvus", 200, "0")
    assert PASSWORD not in Path(site.guest.inside("/var/log/nginx/gpulab.log")).read_text()


def test_who_is_not_known_is_logged_as_nobody(site: Site) -> None:
    """Milvus refuses them, as it does on its own port; this server refuses nobody."""
    site.client("another").list_collections()
    assert {line["tenant"] for line in site.guest.log()} == {""}


def test_answers_stream(site: Site) -> None:
    with channel(site) as opened:
        messages = []
        for message in opened.unary_stream("/test/Count")(b""):
            messages.append(message)
            site.streams.received.release()
    assert messages == [b"1", b"2", b"3", b"4", b"5"]


def test_limits_reach_the_client_in_its_own_words(site: Site) -> None:
    with channel(site) as opened:
        take = opened.unary_unary("/test/Take")
        assert take(b"x" * 2**19) == str(2**19).encode()
        with pytest.raises(grpc.RpcError, match="larger than 1 MiB") as refused:
            take(b"x" * 2**21)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED

    site.apply(requests_per_minute=60, burst=3)
    client = site.client()
    with pytest.raises((MilvusException, grpc.RpcError), match="too many requests"):
        for _ in range(9):
            client.list_collections()
    assert site.guest.log()[-1]["status"] == 429 and site.guest.log()[-1]["grpc_status"] == "8"


def test_addresses_that_may_not_connect_are_told_so(site: Site) -> None:
    site.apply(allowed=["192.0.2.0/24"])
    with channel(site) as opened, pytest.raises(grpc.RpcError, match="may not connect") as refused:
        opened.unary_unary("/test/Take")(b"")
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED


def test_milvus_that_is_down_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    with guest(monkeypatch) as made:
        found = Site(made, free_port(), Milvus())
        found.apply()
        with channel(found) as opened, pytest.raises(grpc.RpcError, match="milvus does not answer") as refused:
            opened.unary_unary("/test/Take")(b"")
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE


def test_what_speaks_no_grpc_is_told_so(site: Site) -> None:
    site.apply()

    assert site.guest.ask(site.port, "/v2/vectordb/collections/list", "astro:x", "POST", b"{}")[0] == 415


def test_reload_under_load_drops_no_call(site: Site) -> None:
    unlimited = {"requests_per_minute": 600000, "burst": 10000}
    site.apply(**unlimited)
    done: list[int] = [0] * 4
    lost: list[str] = []
    end = time.monotonic() + 5

    def calls(number: int) -> None:
        client = site.client()
        while time.monotonic() < end:
            try:
                assert client.list_collections() == ["stars"]
                done[number] += 1
            except (MilvusException, grpc.RpcError, http.client.HTTPException) as error:
                lost.append(str(error))

    threads = [threading.Thread(target=calls, args=(number,)) for number in range(len(done))]
    for each in threads:
        each.start()
    for number in range(4):
        time.sleep(0.8)
        site.apply(read_timeout_s=10 + number, **unlimited)
    for each in threads:
        each.join()

    assert lost == [] and min(done) > 20, (lost, done)

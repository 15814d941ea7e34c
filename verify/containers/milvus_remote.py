# SPDX-License-Identifier: MIT
"""Runs on the guest, as root, with the standard library and Milvus' driver: prints what Milvus answers, as JSON.

It speaks gRPC as clients do, with requests of its own: a refusal for want of rights, or of a login, has a status of its
own there. All requests but a search and a count name what cannot be, so that nothing stays even where one is let in.
Passwords come over stdin.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import sys
import time
import urllib.error
import urllib.request
from typing import Any

#: A Python with Milvus' driver, where this one has none.
TOOLS = "/opt/gpulab/milvus-tools/bin/python"
#: The named ways to index, for users' programs.
PROFILES = "/etc/gpulab/milvus.json"
#: Milvus' own first password.
FIRST = "Milvus"
#: No such collection, and no name that a user or a database can have.
ABSENT, IMPOSSIBLE = "gpulab_verify_absent", "gpulab verify"
#: Seconds for one answer.
ANSWER_S = 5.0
#: Seconds for a collection that is on its way into memory, and for its first search, as after a start of the server.
LOADING_S = 15.0
#: The field of the vectors.
FIELD = "vector"


class Server:
    """Milvus' gRPC API on the guest's loopback address."""

    def __init__(self, port: int) -> None:
        import grpc
        from pymilvus.grpc_gen import milvus_pb2, milvus_pb2_grpc

        self.api = milvus_pb2
        self._failed = grpc.RpcError
        # The guest may have a proxy in its environment; loopback is never behind it.
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.enable_http_proxy", 0)])
        self._stub = milvus_pb2_grpc.MilvusServiceStub(self._channel)

    def ask(self, request: Any, login: str = "", database: str = "") -> tuple[dict[str, Any], Any]:
        """`status` (gRPC's own in words, else `OK` or `REFUSED`) and what was `said`; the answer, None without one.

        The call is named as its request: `QueryRequest` is for `Query`.
        """
        metadata = [("dbname", database)] if database else []
        if login:
            metadata.append(("authorization", base64.b64encode(login.encode()).decode()))
        call = getattr(self._stub, type(request).__name__.removesuffix("Request"))
        try:
            answer = call(request, metadata=metadata, timeout=ANSWER_S)
        except self._failed as error:
            return {"status": error.code().name, "said": str(error.details())[:200]}, None
        told = getattr(answer, "status", answer)
        good = not (told.code or told.error_code)
        return {"status": "OK" if good else "REFUSED", "said": told.reason[:200]}, answer

    def close(self) -> None:
        self._channel.close()


def observe(arguments: dict[str, Any], passwords: dict[str, str | None]) -> dict[str, Any]:
    """`arguments`: `port`, `metrics_port`, and `databases`: name to its declared collections, each with `dimension`,
    `metric`, `top_k` and `search`. `passwords`: of the databases' users and of root; None: the lab has none.

    `error`: why Milvus could not be asked; the parts that would need it are empty then.
    """
    found: dict[str, Any] = {
        "error": "",
        "health": health(arguments["metrics_port"]),
        "unguarded": open_without_login(arguments["metrics_port"]),
        "profiles": profiles(),
        "version": "",
        "root": {"status": "", "said": ""},
        "strangers": {},
        "tenants": {},
        "foreign": {},
        "collections": {},
    }
    try:
        server = Server(arguments["port"])
    except ImportError:
        return {**found, "error": f"{TOOLS} has no driver of Milvus"}
    try:
        return {**found, **asked(server, arguments["databases"], passwords)}
    finally:
        server.close()


def asked(server: Server, databases: dict[str, dict[str, Any]], passwords: dict[str, str | None]) -> dict[str, Any]:
    """All that takes the driver: see `observe`."""
    api = server.api
    logins = {name: f"{name}:{password}" for name, password in passwords.items() if password}
    strangers = {
        "nobody": "",
        "root with Milvus' first password": f"root:{FIRST}",
        "root with a wrong password": "root:gpulab-verify-is-wrong",
        "a user that nobody has": f"{ABSENT}:{FIRST}",
    }
    root, _ = server.ask(api.ListDatabasesRequest(), logins["root"]) if "root" in logins else (no_password(), None)
    version = next(
        (answer.version for login in logins.values() if (answer := server.ask(api.GetVersionRequest(), login)[1])), ""
    )
    return {
        "error": root["said"] if root["status"] in ("UNAVAILABLE", "DEADLINE_EXCEEDED") else "",
        "version": version,
        "root": root,
        "strangers": {who: server.ask(api.ListDatabasesRequest(), login)[0] for who, login in strangers.items()},
        "tenants": {
            name: tenant(server, name, logins.get(name), logins.get("root") if root["status"] == "OK" else None)
            for name in databases
        },
        "foreign": {
            f"{name} in {other}": abroad(server, logins[name], other, list(collections))
            for name in databases
            for other, collections in databases.items()
            if name != other and name in logins
        },
        "collections": {
            f"{name}.{collection}": described(server, logins[name], name, collection, wanted)
            for name, collections in databases.items()
            for collection, wanted in collections.items()
            if name in logins
        },
    }


def no_password() -> dict[str, Any]:
    return {"status": "", "said": "the lab has no such password"}


def tenant(server: Server, name: str, login: str | None, root: str | None) -> dict[str, Any]:
    """Its `login` to its own database, what it may do there (`own`) and to accounts (`managing`); the `roles` that root
    sees of it, None: no such user, or nobody to ask.
    """
    api = server.api
    if login is None:
        return {"login": no_password(), "own": {}, "managing": {}, "roles": None}
    managing = {
        "list users": api.ListCredUsersRequest(),
        "make users": api.CreateCredentialRequest(username=IMPOSSIBLE, password=base64.b64encode(b"x").decode()),
        "make databases": api.CreateDatabaseRequest(db_name=IMPOSSIBLE),
    }
    roles = None
    if root is not None:
        request = api.SelectUserRequest(user=api.UserEntity(name=name), include_role_info=True)
        answer = server.ask(request, root)[1]
        users = [each for each in answer.results if each.user.name == name] if answer else []
        roles = sorted(role.name for role in users[0].roles) if users else None
    return {
        "login": server.ask(api.ShowCollectionsRequest(), login, name)[0],
        "own": {what: server.ask(request, login, name)[0] for what, request in attempts(api).items()},
        "managing": {what: server.ask(request, login)[0] for what, request in managing.items()},
        "roles": roles,
    }


def attempts(api: Any, collection: str = ABSENT) -> dict[str, Any]:
    """Requests that who has rights is told the mistake in, and who has none is refused before anybody looks at them."""
    return {
        "read": api.QueryRequest(collection_name=collection, output_fields=["count(*)"], use_default_consistency=True),
        "search": api.SearchRequest(collection_name=collection),
        "insert": api.InsertRequest(collection_name=collection, num_rows=0),
        "make collections": api.CreateCollectionRequest(collection_name=ABSENT, schema=b""),
        "drop collections": api.DropCollectionRequest(collection_name=ABSENT),
    }


def abroad(server: Server, login: str, database: str, collections: list[str]) -> dict[str, Any]:
    """What a user attempts in a database that is not its own: on no collection at all, and on each declared one."""
    found = {what: server.ask(request, login, database)[0] for what, request in attempts(server.api).items()}
    for name in collections:
        requests = attempts(server.api, name)
        for what in ("read", "search", "insert"):
            found[f"{what} {name}"] = server.ask(requests[what], login, database)[0]
    return found


def described(server: Server, login: str, database: str, name: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """A collection: is it there (`told`), `dimension`, `loaded`, number of `rows`, `index`, number of rows that are
    `indexed`, and a `search` of it.
    """
    api = server.api
    told, schema = server.ask(api.DescribeCollectionRequest(collection_name=name), login, database)
    found: dict[str, Any] = {
        "told": told, "dimension": None, "loaded": False, "rows": None, "index": None, "indexed": 0, "search": None
    }  # fmt: skip
    if told["status"] != "OK":
        return found
    for field in schema.schema.fields:
        if field.name == FIELD:
            found["dimension"] = int({each.key: each.value for each in field.type_params}.get("dim", "0"))
    found["loaded"] = load_state(server, login, database, name) == "LoadStateLoaded"
    counted = server.ask(attempts(api, name)["read"], login, database)[1]
    if counted is not None and counted.fields_data:
        found["rows"] = counted.fields_data[0].scalars.long_data.data[0]
    answer = server.ask(api.DescribeIndexRequest(collection_name=name), login, database)[1]
    for each in answer.index_descriptions if answer is not None else []:
        if each.field_name == FIELD:
            found["index"], found["indexed"] = parameters(each.params), each.indexed_rows
    if found["loaded"]:
        found["search"] = searched(server, login, database, name, found["dimension"] or wanted["dimension"], wanted)
    return found


def load_state(server: Server, login: str, database: str, name: str) -> str:
    """In the protocol's own words; empty: the server does not say."""
    deadline = time.monotonic() + LOADING_S
    while True:
        answer = server.ask(server.api.GetLoadStateRequest(collection_name=name), login, database)[1]
        if answer is None:
            return ""
        words = type(answer).DESCRIPTOR.fields_by_name["state"].enum_type.values_by_number
        state = str(words[answer.state].name)
        if state != "LoadStateLoading" or time.monotonic() >= deadline:
            return state
        time.sleep(0.5)


def parameters(pairs: Any) -> dict[str, str]:
    """An index's parameters, all as text; some servers tell part of them as one JSON object."""
    found = {each.key: each.value for each in pairs}
    return {**as_texts(found.pop("params", "")), **found}


def as_texts(text: str) -> dict[str, str]:
    try:
        inner = json.loads(text)
    except ValueError:
        return {}
    return {key: str(value) for key, value in inner.items()} if isinstance(inner, dict) else {}


def searched(
    server: Server, login: str, database: str, name: str, dimension: int, wanted: dict[str, Any]
) -> dict[str, Any]:
    """One search with the profile's own parameters: what it came to, its `seconds`, and how many rows it `found`."""
    from pymilvus.grpc_gen import common_pb2 as common

    vector = struct.pack(f"<{dimension}f", *([1.0] + [0.0] * (dimension - 1)))
    holder = common.PlaceholderValue(tag="$0", type=common.PlaceholderType.FloatVector, values=[vector])
    words = {
        "anns_field": FIELD,
        "topk": str(wanted["top_k"]),
        "metric_type": wanted["metric"],
        "params": json.dumps(wanted["search"]),
    }
    request = server.api.SearchRequest(
        collection_name=name,
        placeholder_group=common.PlaceholderGroup(placeholders=[holder]).SerializeToString(),
        dsl_type=common.DslType.BoolExprV1,
        nq=1,
        search_params=[common.KeyValuePair(key=key, value=value) for key, value in words.items()],
        use_default_consistency=True,
    )
    deadline = time.monotonic() + LOADING_S
    while True:
        began = time.monotonic()
        told, answer = server.ask(request, login, database)
        seconds = time.monotonic() - began
        # The first search after a start waits for what the server has yet to read of its own log.
        if told["status"] == "OK" or time.monotonic() >= deadline:
            break
        time.sleep(0.5)
    return {**told, "seconds": seconds, "found": len(answer.results.scores) if told["status"] == "OK" else 0}


def health(port: int) -> str:
    """`OK`, or what Milvus says instead."""
    status, text = get(port, "/healthz")
    return "OK" if status == 200 and text.strip() == "OK" else text.strip()[:200] or f"HTTP {status}"


def open_without_login(port: int) -> list[str]:
    """Paths of Milvus' other HTTP API, on the port of its metrics, that tell something to somebody unknown."""
    paths = ("/api/v1/credential/users", "/api/v1/collections")
    return [path for path in paths if get(port, path, b"{}")[0] == 200]


def get(port: int, path: str, body: bytes | None = None) -> tuple[int, str]:
    """HTTP status (0: no answer) and text."""
    # Asked for JSON, it tells its health in another form.
    headers = {} if body is None else {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body, headers, method="GET")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=ANSWER_S) as answer:
            return answer.status, answer.read(10_000).decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read(300).decode(errors="replace")
    except OSError as error:
        return 0, str(error)


def profiles() -> dict[str, Any] | None:
    """The guest's file of index profiles; None: there is none that can be read."""
    try:
        with open(PROFILES) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def main() -> None:
    try:
        import pymilvus  # noqa: F401
    except ImportError:
        if os.path.exists(TOOLS) and os.path.realpath(sys.prefix) != os.path.realpath(os.path.dirname(TOOLS) + "/.."):
            os.execv(TOOLS, [TOOLS, *sys.orig_argv[1:]])
    print(json.dumps(observe(json.loads(sys.argv[1]), json.load(sys.stdin))))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: MIT
"""The proxy on a lab: users' own clients through it, tokens that rotate, and no secret where it must not be."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import ollama
import openai
import pytest
from pymilvus import MilvusException

import inventory
from inventory.secrets import Secrets, previous_of
from rehearsal import host
from tests.lab.clients import ca, curl, milvus_client, ollama_client, openai_client, token_of, url_of
from tests.lab.commands import INVENTORY
from tests.lab.leaks import leaks, places_of, secrets_of, watched_processes

GPU01 = ("--limit", "gpu01")
LOG = "/var/log/nginx/gpulab.log"
ROTATE = ("rotate.py", "-y", *GPU01)
ASTRO = ("--data", "tenant=astro", "--data", "service=ollama")
#: pymilvus passes on what gRPC itself says no to.
REFUSED = (MilvusException, grpc.RpcError)
STRANGER = "a-token-that-nobody-was-ever-given-0123"


def log(deployed: Any) -> list[dict[str, Any]]:
    time.sleep(0.2)
    return [json.loads(line) for line in deployed.on("gpu01", "cat", LOG).splitlines()]


def stored(name: str) -> str | None:
    lab = inventory.load(INVENTORY)
    return Secrets(lab.guests["gpu01"].state).get(lab.node_of(lab.guests["gpu01"]).cluster_name, name, "gpu01")


def test_curl_with_a_token_without_one_and_with_a_strangers(deployed: Any) -> None:
    status, body = curl("/api/tags", token_of("astro"))
    assert (status, [model["name"] for model in json.loads(body)["models"]]) == (200, ["tiny:latest"])
    assert curl("/api/tags")[0] == 401
    assert curl("/api/tags", STRANGER)[0] == 401
    assert curl("/api/pull", token_of("astro"), "--data", '{"model": "tiny"}')[0] == 403
    assert curl("/api/delete", token_of("astro"), "--request", "DELETE", "--data", '{"model": "tiny"}')[0] == 403


def test_ollamas_client_streams_through_the_proxy(deployed: Any) -> None:
    with ollama_client("astro") as client:
        answer = client.generate(model="tiny", prompt="stars", stream=True, options={"num_predict": 32})
        # A random model may end its answer early, and is quick: tests/proxy measures that parts come one by one.
        parts = [part.done for part in answer]
        assert parts[-1] and not any(parts[:-1])
    for value in (None, STRANGER):
        with ollama_client(value=value) as client, pytest.raises(ollama.ResponseError) as refused:
            client.list()
        assert refused.value.status_code == 401
    with ollama_client("astro") as client, pytest.raises(ollama.ResponseError) as refused:
        client.pull("tiny")
    assert refused.value.status_code == 403 and "not open to users" in refused.value.error


def test_openais_client_uses_the_token_as_its_key(deployed: Any) -> None:
    question: Any = {"model": "tiny", "messages": [{"role": "user", "content": "stars"}], "max_tokens": 8}
    with openai_client(token_of("astro")) as client:
        answer = client.chat.completions.create(**question)
        assert answer.choices[0].finish_reason in ("stop", "length")
        assert len(list(client.chat.completions.create(**question, stream=True))) > 1
    with openai_client(STRANGER) as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_pymilvus_reaches_its_own_database_over_tls(deployed: Any) -> None:
    astro, ml = (f"{tenant}:{token_of(tenant, 'milvus')}" for tenant in ("astro", "ml"))
    with milvus_client(astro, "astro") as client:
        client.list_collections()
    lines = [line for line in log(deployed) if line["service"] == "milvus"]
    assert lines[-1]["tenant"] == "astro" and lines[-1]["path"].startswith("/milvus.proto.milvus.MilvusService/")
    # This server (2.3) tells the names of collections to everybody who logs in; their rows it does not.
    with milvus_client(ml, "astro") as client:
        for forbidden in (
            lambda: client.query("spectra", filter="id >= 0", limit=1),
            lambda: client.insert("spectra", [{"id": 1, "vector": [0.0] * 128}]),
            lambda: client.drop_collection("spectra"),
        ):
            with pytest.raises(REFUSED, match="permission deny"):
                forbidden()
    for wrong in (f"astro:{STRANGER}", f"astro:{ml.partition(':')[2]}", ""):
        with pytest.raises(MilvusException), milvus_client(wrong, "astro") as client:
            client.list_collections()


def test_milvus_has_no_rest(deployed: Any) -> None:
    """It would come with an API on the port of the metrics that asks nobody for a login."""
    login = f"astro:{token_of('astro', 'milvus')}"
    assert curl("/v1/vector/collections?dbName=astro", login, service="milvus")[0] == 415


def test_each_tenant_is_who_its_token_says(deployed: Any) -> None:
    """Another tenant's token is that tenant: the log, not the sender, says who it was."""
    for tenant in ("astro", "ml"):
        assert curl("/api/version", token_of(tenant))[0] == 200
        assert log(deployed)[-1]["tenant"] == tenant


def test_tenant_that_may_not_use_a_service_is_refused(deployed: Any) -> None:
    """It has no token; one that it had is worth nothing any more."""
    before = token_of("ml")
    guest = inventory.load(INVENTORY).guests["gpu01"]
    tenants = [each.model_dump(exclude_unset=True) for each in guest.tenants]
    tenants[1]["services"] = []
    done = deployed.deploy(*GPU01, "--data", f"tenants={json.dumps(tenants)}")
    try:
        assert done.status == 0, done.output[-3000:]
        assert curl("/api/version", before)[0] == 401
        assert curl("/api/version", token_of("astro"))[0] == 200
    finally:
        assert deployed.deploy(*GPU01).status == 0
    assert curl("/api/version", before)[0] == 200


def test_rotation_drops_no_request_and_ends_the_old_token(deployed: Any) -> None:
    """A client that learns of its new token when it is stored is let in at every moment."""
    over, wrong, asked = threading.Event(), list[int](), 0

    def ask() -> None:
        nonlocal asked
        with httpx.Client(verify=ca(), base_url=url_of()) as client:
            while not over.is_set():
                # Read before the request: either value must be valid for as long as it takes.
                value = stored("token.ollama.astro.previous") or token_of("astro")
                status = client.get("/api/version", headers={"Authorization": f"Bearer {value}"}).status_code
                if status != 200 and stored("token.ollama.astro.previous") == value:
                    wrong.append(status)
                asked += 1
                time.sleep(0.02)

    old = token_of("astro")
    client = threading.Thread(target=ask)
    client.start()
    try:
        done = deployed.pyinfra(*ROTATE, *ASTRO)
    finally:
        over.set()
        client.join()

    assert done.status == 0, done.output[-3000:]
    new = token_of("astro")
    assert new != old and stored("token.ollama.astro.previous") is None
    assert (curl("/api/version", new)[0], curl("/api/version", old)[0]) == (200, 401)
    assert asked > 10 and set(wrong) <= {401} and len(wrong) <= 1
    assert curl("/api/version", token_of("ml"))[0] == 200
    assert deployed.deploy(*GPU01).status == 0 and deployed.changed() == []


def test_previous_token_stays_as_long_as_it_is_asked_for(deployed: Any) -> None:
    old = token_of("astro")
    done = deployed.pyinfra(*ROTATE, *ASTRO, "--data", "keep_previous=1")
    assert done.status == 0, done.output[-3000:]
    new = token_of("astro")
    assert [curl("/api/version", each)[0] for each in (old, new)] == [200, 200]
    # A deploy in between leaves both.
    assert deployed.deploy(*GPU01).status == 0 and deployed.changed() == []
    assert curl("/api/version", old)[0] == 200

    assert deployed.pyinfra(*ROTATE, *ASTRO).status == 0
    assert token_of("astro") == new
    assert [curl("/api/version", each)[0] for each in (old, new)] == [401, 200]


@pytest.mark.parametrize("seconds", [2.0, 3.0, 4.0, 5.5])
def test_killed_rotation_is_ended_by_the_next(deployed: Any, seconds: float) -> None:
    old = token_of("astro")
    deployed.killed(seconds, *ROTATE, *ASTRO)
    usable = [each for each in {old, token_of("astro")} if curl("/api/version", each)[0] == 200]
    assert usable, "a killed rotation locked the tenant out"

    assert deployed.pyinfra(*ROTATE, *ASTRO).status == 0
    assert stored("token.ollama.astro.previous") is None
    assert curl("/api/version", token_of("astro"))[0] == 200
    assert curl("/api/version", old)[0] == 401
    assert deployed.deploy(*GPU01).status == 0 and deployed.changed() == []


def test_token_that_is_not_answered_leaves_the_previous_one(deployed: Any) -> None:
    old = token_of("astro")
    deployed.on("gpu01", "docker", "stop", "ollama")
    try:
        done = deployed.pyinfra(*ROTATE, *ASTRO)
        assert done.status == 1
        assert "the previous one stays valid" in done.output, done.output
        assert "HTTP 502, expected 200" in done.output, done.output
        assert stored("token.ollama.astro.previous") == old
    finally:
        deployed.on("gpu01", "docker", "start", "ollama")
    assert deployed.deploy(*GPU01).status == 0
    assert curl("/api/version", old)[0] == 200
    assert deployed.pyinfra(*ROTATE, *ASTRO).status == 0
    assert curl("/api/version", old)[0] == 401


def test_words_that_mean_nobody_are_refused(deployed: Any) -> None:
    done = deployed.pyinfra(*ROTATE, "--data", "tenant=nobody")
    assert done.status == 1 and "Expected one of: astro, ml." in done.output
    done = deployed.pyinfra(*ROTATE, "--data", "service=pytorch")
    assert done.status == 1 and "it has no bearer tokens" in done.output


def test_without_access_nginx_is_gone_and_comes_back(deployed: Any) -> None:
    done = deployed.deploy(*GPU01, "--data", "access=null")
    try:
        assert done.status == 0, done.output[-3000:]
        assert host.run("gpu01", ["systemctl", "is-active", "nginx"]).stdout.strip() == "inactive"
        assert host.run("gpu01", ["systemctl", "is-enabled", "nginx"]).stdout.strip() == "disabled"
        assert host.run("gpu01", ["ls", "/etc/nginx/gpulab", "/etc/nginx/conf.d/gpulab.conf"]).stdout == ""
        assert deployed.deploy(*GPU01, "--data", "access=null").status == 0 and deployed.changed() == []
    finally:
        assert deployed.deploy(*GPU01).status == 0
    assert curl("/api/version", token_of("astro"))[0] == 200


def test_proxy_comes_back_after_a_reboot_and_a_kill(deployed: Any) -> None:
    deployed.on("gpu01", "sh", "-c", "kill -9 $(cat /run/nginx.pid)")
    deadline = time.monotonic() + 30
    while True:
        try:
            if curl("/api/version", token_of("astro"))[0] == 200:
                break
        except ValueError:
            pass
        assert time.monotonic() < deadline, "nginx does not come back"
        time.sleep(0.5)
    assert deployed.deploy(*GPU01).status == 0 and deployed.changed() == []


def test_the_log_is_turned_over(deployed: Any) -> None:
    curl("/api/version", token_of("astro"))
    deployed.on("gpu01", "logrotate", "--force", "/etc/logrotate.d/nginx")
    deadline = time.monotonic() + 10
    while not (host.root("gpu01") / f"{LOG[1:]}.1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    curl("/api/version", token_of("ml"))
    assert [line["tenant"] for line in log(deployed)][-1] == "ml"


def test_no_secret_turns_up_anywhere(deployed: Any) -> None:
    """After deploys, new passwords, a rotation, requests of all kinds, a job and a run that fails, all with -vvv."""
    old = {f"before {name}": value for name, value in secrets_of().items()}
    lab = inventory.load(INVENTORY)
    guest, cluster = lab.guests["gpu01"], lab.node_of(lab.guests["gpu01"]).cluster_name
    secrets, passwords = Secrets(guest.state), ("milvus.root", "milvus.astro")
    # What a job is given, all of it in the job's own log.
    tell = (
        "gpulab-run",
        "--tenant",
        "astro",
        "--name",
        "tell",
        "--",
        "sh",
        "-c",
        "env; cat /proc/mounts /proc/*/cmdline",
    )
    with watched_processes() as seen:
        deployed.on("gpu01", "sh", "-c", "rm -rf /etc/nginx/gpulab /etc/nginx/conf.d/gpulab.conf")
        deployed.on("gpu01", "docker", "rm", "--force", "milvus", "ollama")
        for name in passwords:
            secrets.rotate(cluster, name, guest.name)
        outputs = {"plan": deployed.plan(*GPU01, "-vvv")}
        outputs["deploy"] = deployed.deploy(*GPU01, "-vvv")
        outputs["rotation"] = deployed.pyinfra(*ROTATE, "-vvv")
        with ollama_client("astro") as client:
            client.generate(model="tiny", prompt="stars", options={"num_predict": 4})
        for value in (token_of("astro"), token_of("ml"), STRANGER):
            curl(f"/api/version?key={value}", value)
            curl("/api/pull", value, "--data", "{}")
        with milvus_client(f"astro:{token_of('astro', 'milvus')}", "astro") as milvus:
            milvus.list_collections()
        for value in (old[f"before {cluster} gpu01 milvus.astro"], STRANGER):
            with pytest.raises(MilvusException), milvus_client(f"astro:{value}", "astro") as milvus:
                milvus.list_collections()
        deployed.on("gpu01", *tell)
        deployed.on(
            "gpu01", "sh", "-c", "echo 'nonsense on;' > /etc/nginx/conf.d/site.conf; rm /etc/nginx/gpulab/*.key"
        )
        try:
            outputs["failure"] = deployed.deploy(*GPU01, "-vvv")
        finally:
            deployed.on("gpu01", "rm", "/etc/nginx/conf.d/site.conf")
        for name in passwords:
            secrets.drop(cluster, previous_of(name), guest.name)
        outputs["mended"] = deployed.deploy(*GPU01, "-vvv")
        outputs["verify"], failed = deployed.verify(*GPU01, "-k", "containers")
    assert [outputs[name].status for name in ("deploy", "rotation", "failure", "mended")] == [0, 0, 1, 0]
    assert failed == set()
    for words in ("containers/proxy", "milvus-tools/bin/python -c", "gpulab-run --tenant astro"):
        assert any(words in line for line in seen), f"no process of {words} was seen"
    looked_at, job = places_of(deployed, "gpu01"), "gpu01:/var/log/gpulab/jobs/astro/tell.log"
    told = {f"gpu01: docker {words} {name}" for words in ("inspect", "logs") for name in ("ollama", "milvus")}
    assert told <= looked_at.keys() and "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT" in looked_at[job]

    hidden = {**secrets_of(), **old}
    kinds = {"api_token", "token.ollama.astro", "milvus.root", "milvus.storage", "milvus.astro", "containers.key"}
    assert kinds <= set(" ".join(hidden).replace(",", "").split()), sorted(hidden)
    texts = {f"output of {name}": done.output for name, done in outputs.items()}
    found = leaks(deployed, secrets=hidden, processes=str(seen), **texts)
    assert found == [], found


def test_the_search_finds_what_is_there(deployed: Any) -> None:
    """A search that finds nothing must be able to find something."""
    assert any("nginx" in place for place in places_of(deployed, "gpu01"))
    secret = next(iter(secrets_of().items()))
    name, value = secret
    deployed.on("gpu01", "logger", f"said {value}")
    log_file = host.root("gpu01") / "var/log/said.log"
    log_file.write_text(value)
    try:
        found = leaks(deployed, secrets={name: value}, output=f"x{value}y")
    finally:
        log_file.unlink()
        deployed.on("gpu01", "sh", "-c", "journalctl --rotate; journalctl --vacuum-time=1s")
    assert found == [f"gpu01:/var/log/said.log: {name}", f"gpu01: journal: {name}", f"output: {name}"]
    assert Path(INVENTORY).exists()

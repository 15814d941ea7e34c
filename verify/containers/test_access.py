# SPDX-License-Identifier: MIT
"""Who gets to the services from the network: over TLS, each with its own token, through one door and on record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from inventory import Guest
from verify.containers.access import requests_of
from verify.observations import Observation
from verify.verdicts import not_run

pytestmark = pytest.mark.on("access")

DEPLOY = "pyinfra {lab} deploy.py --limit {host}"
#: Days. Any deploy renews a certificate of the lab's own CA earlier than that.
LEAST_DAYS = 30
#: What a line of the log must tell.
KEYS = {"time", "tenant", "service", "method", "path", "status", "bytes", "seconds", "request", "client"}


@pytest.mark.critical
@pytest.mark.promise("containers.access.nginx", "access", fix=DEPLOY)
def test_nginx_runs_and_starts_with_the_guest(guest: Guest, access: Observation, seen: Callable[[str], None]) -> None:
    on_guest = access["guest"]
    assert on_guest["active"] == "active", f"{guest.name}: nginx is {on_guest['active'] or 'absent'}, expected active"
    assert on_guest["enabled"] == "enabled", f"{guest.name}: nginx is {on_guest['enabled']}, expected enabled"
    assert not on_guest["refused"], f"{guest.name}: nginx would not start again: {on_guest['refused']}"
    seen("active and enabled")


@pytest.mark.critical
@pytest.mark.promise("containers.{service}.tls", "services.{service}.port", "access.certificate", fix=DEPLOY)
def test_certificate_is_valid_for_the_guest(
    guest: Guest, service: str, access: Observation, seen: Callable[[str], None]
) -> None:
    require_nginx(access)
    found, port = access["services"][service]["tls"], guest.services.served()[service].port
    where = f"{guest.name}: https://{guest.address.ip}:{port}"
    assert not found["error"], f"{where}: {found['error']}"
    assert found["protocol"] in ("TLSv1.2", "TLSv1.3"), f"{where} speaks {found['protocol']}, expected TLS 1.2 or newer"
    assert found["days"] > LEAST_DAYS, (
        f"{where}: its certificate ends in {found['days']:.0f} days, expected more than {LEAST_DAYS}"
    )
    seen(f"{found['protocol']}, {found['days']:.0f} days left")


@pytest.mark.critical
@pytest.mark.promise("containers.{by_token}.token.required", "services.{by_token}.port", fix=DEPLOY)
def test_nobody_gets_in_without_a_token(
    guest: Guest, by_token: str, access: Observation, seen: Callable[[str], None]
) -> None:
    answers = answers_of(access, by_token)
    wrong = {
        who: answer
        for who, answer in answers["strangers"].items()
        if answer["status"] != 401 or not str(answer["challenge"]).startswith("Bearer")
    }
    told = "; ".join(f"{who} gets {said(answer)}" for who, answer in wrong.items())
    assert not wrong, f"{guest.name}: {by_token}: {told}; expected HTTP 401 and WWW-Authenticate: Bearer"
    seen(f"401 for {', '.join(answers['strangers'])}")


@pytest.mark.major
@pytest.mark.promise("containers.{by_token}.token.accepted", "tenants", fix=DEPLOY)
def test_each_tenant_gets_in_with_its_token(
    guest: Guest, by_token: str, access: Observation, seen: Callable[[str], None]
) -> None:
    tenants = answers_of(access, by_token)["tenants"]
    if not tenants:
        not_run("no tenant may use it")
    missing = [who for who, answer in tenants.items() if answer is None]
    assert not missing, f"{guest.name}: {by_token}: {', '.join(missing)} has no token yet"
    wrong = {who: answer for who, answer in tenants.items() if answer["status"] != 200}
    told = "; ".join(f"{who} gets {said(answer)}" for who, answer in wrong.items())
    assert not wrong, f"{guest.name}: {by_token}: {told}; expected HTTP 200"
    seen(", ".join(tenants))


@pytest.mark.major
@pytest.mark.promise("containers.{by_token}.managing", "tenants", fix=DEPLOY)
def test_no_tenant_manages_models(
    guest: Guest, by_token: str, access: Observation, seen: Callable[[str], None]
) -> None:
    answer = answers_of(access, by_token)["managing"]
    if answer is None:
        not_run("no tenant may use it")
    assert answer["status"] == 403, (
        f"{guest.name}: {by_token}: a tenant gets {said(answer)} for what manages models, expected HTTP 403"
    )
    seen(said(answer))


@pytest.mark.critical
@pytest.mark.promise("containers.access.ports", fix="close what listens there on {host}; then " + DEPLOY)
def test_no_other_port_is_open(guest: Guest, access: Observation, seen: Callable[[str], None]) -> None:
    declared = {guest.ssh_port, *(each.port for each in guest.services.served().values())}
    wrong = [each for each in access["open"] if each["port"] not in declared]
    told = ", ".join(f"{each['port']} ({each['program'] or 'unknown'})" for each in wrong)
    assert not wrong, (
        f"{guest.name}: port {told} of {guest.address.ip} is open to the network, "
        "expected SSH and the declared services only"
    )
    seen(f"open: {', '.join(str(each['port']) for each in access['open'])}")


@pytest.mark.major
@pytest.mark.promise("containers.access.log", fix=DEPLOY)
def test_log_says_who_did_what(guest: Guest, access: Observation, seen: Callable[[str], None]) -> None:
    log, asked = access["guest"]["log"], requests_of(access["services"])
    assert log["mode"] is not None, f"{guest.name}: the proxy writes no log"
    assert log["mode"] & 0o007 == 0, f"{guest.name}: everybody on the guest can read the log (mode {log['mode']:04o})"
    assert not log["broken"], f"{guest.name}: {log['broken']} of the log's last lines are no JSON"
    if not asked:
        not_run("no request was let in")
    lines = {line["request"]: line for line in log["lines"]}
    for request, tenant in asked.items():
        line = lines.get(request)
        assert line is not None, f"{guest.name}: the log has no line of a request of {tenant} just now"
        assert line.keys() >= KEYS, f"{guest.name}: the log does not tell {', '.join(sorted(KEYS - line.keys()))}"
        assert line["tenant"] == tenant, f"{guest.name}: the log takes {tenant} for {line['tenant'] or 'nobody'}"
    seen(f"{len(asked)} requests found in it")


@pytest.mark.critical
@pytest.mark.promise("containers.access.secrets", fix=DEPLOY)
def test_root_alone_reads_tokens_and_key(guest: Guest, access: Observation, seen: Callable[[str], None]) -> None:
    files = access["guest"]["files"]
    folders = [path for path, each in files.items() if each["folder"]]
    assert folders, f"{guest.name}: there is no folder of the proxy's secrets"
    open_ = [
        f"{path} (uid {each['uid']}, mode {each['mode']:04o})"
        for path, each in files.items()
        if each["uid"] != 0 or (each["mode"] & 0o077 and (each["folder"] or not path.endswith(".pem")))
    ]
    assert not open_, f"{guest.name}: others than root can read {', '.join(open_)}"
    seen(f"{len(files)} files and folders")


def require_nginx(access: Observation) -> None:
    if access["guest"]["active"] != "active":
        not_run("nginx does not run")


def answers_of(access: Observation, service: str) -> dict[str, Any]:
    """What callers of a service with tokens got."""
    require_nginx(access)
    found: dict[str, Any] = access["services"][service]["answers"]
    if access["services"][service]["tls"]["error"]:
        not_run(f"{service} shows no certificate that a client accepts")
    if all(answer["status"] == 403 for answer in found["strangers"].values()):
        not_run("this machine is not among `allow_from`")
    return found


def said(answer: dict[str, Any]) -> str:
    return f"HTTP {answer['status']}" if answer["status"] else f"no answer ({answer['error']})"

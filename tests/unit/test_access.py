# SPDX-License-Identifier: MIT
"""Tokens, certificates, and what a deploy and a rotation decide of the proxy."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

import inventory
from inventory import GpulabError, Lab
from inventory.access import known_as
from inventory.secrets import Secrets, previous_of
from inventory.tokens import lines, main
from operations.containers.authority import LEAF_DAYS, RENEW_DAYS, Authority
from operations.containers.proxy import (
    CONFIGURATION,
    DEFAULT_SITE,
    FOLDER,
    KEY,
    SHOWN,
    Proxy,
    decide,
    directive,
    generation_of,
    headers_of,
    proxy_of,
    wanted_files,
)
from operations.containers.rotate import Target, begin, end, targets
from tests.unit.test_inventory import GUEST, IMAGE, lab_file, refused

NOW = datetime.datetime(2026, 11, 29, tzinfo=datetime.UTC)
DAY = datetime.timedelta(days=1)
SERVICES = {
    "ollama": {"image": IMAGE},
    "milvus": {"image": IMAGE, "memory_budget_mib": 1024, "pool_init_mib": 256},
}
TENANTS = [{"name": "astro"}, {"name": "ml", "services": ["milvus"]}]
ADDRESS = "192.0.2.101"


def lab(folder: Path, **keys: Any) -> Lab:
    guest = {**GUEST, "services": SERVICES, "tenants": TENANTS, "state_dir": str(folder / "state"), **keys}
    return inventory.load(lab_file(folder, guests={"gpu01": guest}))


def given_pair(folder: Path, *names: str, now: datetime.datetime | None = None) -> dict[str, str]:
    authority = Authority(folder / "other-ca")
    authority.issue("given", names, now)
    return {"certificate": str(folder / "other-ca/given.pem"), "key": str(folder / "other-ca/given.key")}


# Certificates.


def test_ca_is_made_once_and_its_keys_are_private(tmp_path: Path) -> None:
    first = Authority(tmp_path / "ca").issue("gpu01", ["gpu01", ADDRESS], NOW)
    ca = (tmp_path / "ca/ca.pem").read_bytes()
    again = Authority(tmp_path / "ca").issue("gpu01", [ADDRESS, "gpu01"], NOW)
    other = Authority(tmp_path / "ca").issue("gpu02", ["gpu02"], NOW)

    assert again == first and other != first
    assert (tmp_path / "ca/ca.pem").read_bytes() == ca
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ca").glob("*.key")}
    assert modes == {"ca.key": 0o600, "gpu01.key": 0o600, "gpu02.key": 0o600}
    leaf, authority = x509.load_pem_x509_certificates(first.certificate.encode())
    leaf.verify_directly_issued_by(authority)
    assert authority == x509.load_pem_x509_certificate(ca)


@pytest.mark.parametrize(
    ("days", "names", "renewed"),
    [
        (0, ["gpu01", ADDRESS], False),
        (LEAF_DAYS - RENEW_DAYS - 1, ["gpu01", ADDRESS], False),
        (LEAF_DAYS - RENEW_DAYS, ["gpu01", ADDRESS], True),
        (LEAF_DAYS + 9, ["gpu01", ADDRESS], True),
        (0, ["gpu01", ADDRESS, "gpu01.lab.example"], True),
        (0, ["gpu01"], True),
    ],
)
def test_certificate_is_made_anew_in_time_and_for_other_names(
    tmp_path: Path, days: int, names: list[str], renewed: bool
) -> None:
    authority = Authority(tmp_path)
    first = authority.issue("gpu01", ["gpu01", ADDRESS], NOW)
    assert (authority.issue("gpu01", names, NOW + days * DAY) != first) == renewed


def test_address_in_another_spelling_is_the_same(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    names = ["gpu01", "2001:DB8:0::1"]
    assert authority.issue("gpu01", names, NOW) == authority.issue("gpu01", names, NOW)


@pytest.mark.parametrize("damage", ["gpu01.pem", "gpu01.key", "ca.pem", "ca.key"])
def test_damaged_file_of_the_ca_is_said(tmp_path: Path, damage: str) -> None:
    Authority(tmp_path).issue("gpu01", ["gpu01"], NOW)
    (tmp_path / damage).write_text("no PEM")
    with pytest.raises(GpulabError, match="a file of the lab's CA is damaged"):
        Authority(tmp_path).issue("gpu01", ["gpu01"], NOW)


def test_run_that_was_killed_while_the_ca_was_made_is_no_harm(tmp_path: Path) -> None:
    Authority(tmp_path).issue("gpu01", ["gpu01"], NOW)
    (tmp_path / "ca.pem").unlink()
    pair = Authority(tmp_path).issue("gpu01", ["gpu01"], NOW)
    leaf, authority = x509.load_pem_x509_certificates(pair.certificate.encode())
    leaf.verify_directly_issued_by(authority)


def test_ca_that_ends_too_soon_is_refused(tmp_path: Path) -> None:
    Authority(tmp_path).issue("gpu01", ["gpu01"], NOW)
    with pytest.raises(GpulabError, match=r"ca\.pem ends on 2036-11-26"):
        Authority(tmp_path).issue("gpu01", ["gpu01"], NOW + 3400 * DAY)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["192.0.2.101", "other"], "192.0.2.101"),
        (["other", "gpu01"], "gpu01"),
        (["GPU01.lab.example"], "GPU01.lab.example"),
        (["*.lab.example"], "gpu01.lab.example"),
        (["*.other.example", "gpu011", "192.0.2.1"], None),
        ([], None),
    ],
)
def test_names_that_stand_for_the_guest(tmp_path: Path, names: list[str], found: str | None) -> None:
    assert known_as(names, lab(tmp_path, searchdomain="lab.example").guests["gpu01"]) == found


def test_given_certificate_is_used_as_it_is(tmp_path: Path) -> None:
    pair = given_pair(tmp_path, "gpu01.lab.example")
    guest = lab(tmp_path, access=pair)

    wanted = wanted_files(proxy_of(guest, guest.guests["gpu01"]), "1.26.3")
    assert wanted[KEY].content == Path(pair["key"]).read_text()
    assert not (tmp_path / "state/ca/services").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda pair: pair, "for gpu01 or 192.0.2.101; it is for other.example"),
        (lambda pair: {**pair, "key": "/nowhere.key"}, "/nowhere.key: No such file or directory; expected a PEM file"),
        (lambda pair: {"certificate": pair["key"], "key": pair["key"]}, "expected a certificate in PEM"),
        (lambda pair: {**pair, "key": pair["certificate"]}, "expected a private key in PEM, without a passphrase"),
        (lambda pair: {**pair, "key": pair["key"].replace("given.key", "ca.key")}, "it is another's"),
        (lambda pair: {"certificate": pair["certificate"]}, "expected `certificate` and `key` together"),
    ],
)
def test_given_certificate_that_cannot_be_used_is_refused(
    tmp_path: Path, spoil: Callable[[dict[str, str]], dict[str, str]], words: str
) -> None:
    pair = spoil(given_pair(tmp_path, "other.example"))
    said = refused(lab_file(tmp_path, guests={"gpu01": {**GUEST, "services": SERVICES, "access": pair}}))
    assert words in said and "nothing was changed" in said
    assert "PRIVATE KEY" not in said


@pytest.mark.parametrize(("days", "words"), [(-LEAF_DAYS - 2, "it expired on"), (9, "it will be from")])
def test_given_certificate_out_of_its_time_is_refused(tmp_path: Path, days: int, words: str) -> None:
    pair = given_pair(tmp_path, "gpu01", now=datetime.datetime.now(datetime.UTC) + days * DAY)
    said = refused(lab_file(tmp_path, guests={"gpu01": {**GUEST, "services": SERVICES, "access": pair}}))
    assert words in said


# Secrets.


def test_rotation_keeps_the_previous_secret_in_one_step(tmp_path: Path) -> None:
    secrets = Secrets(tmp_path)
    old = secrets.once("pve1", "token.ollama.astro", "gpu01")
    assert secrets.rotate("pve1", "token.ollama.astro", "gpu01")
    new = secrets.get("pve1", "token.ollama.astro", "gpu01")

    assert new != old and secrets.get("pve1", "token.ollama.astro.previous", "gpu01") == old
    assert not secrets.rotate("pve1", "token.ollama.astro", "gpu01"), "a third one was made"
    secrets.drop("pve1", "token.ollama.astro.previous", "gpu01")
    assert json.loads(secrets.path.read_text()) == {"pve1": {"gpu01": {"token.ollama.astro": new}}}
    assert stat.S_IMODE(secrets.path.stat().st_mode) == 0o600


def test_secret_of_the_environment_is_not_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPULAB_SECRET_PVE1_GPU01_TOKEN_OLLAMA_ASTRO", "a-token-of-the-environment")
    with pytest.raises(GpulabError, match="is set by the environment variable GPULAB_SECRET_PVE1_GPU01_TOKEN") as said:
        Secrets(tmp_path).rotate("pve1", "token.ollama.astro", "gpu01")
    assert "a-token-of" not in str(said.value)


def test_command_prints_what_one_tenant_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = lab(tmp_path)
    guest = made.guests["gpu01"]
    with pytest.raises(GpulabError, match="astro has no token of ollama on gpu01 yet"):
        lines(made, guest, "astro")
    proxy_of(made, guest)
    secrets = Secrets(guest.state)
    token, password = (secrets.get("pve1", name, "gpu01") for name in ("token.ollama.astro", "milvus.astro"))

    assert main([str(tmp_path / "lab.py"), "gpu01", "astro"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        f"ollama\thttps://{ADDRESS}:11434\t{token}",
        f"milvus\thttps://{ADDRESS}:19530\tastro:{password}",
    ]
    assert [line.split("\t")[0] for line in lines(made, guest, "ml")] == ["milvus", "ca"]
    assert main([str(tmp_path / "lab.py"), "gpu01", "nobody"]) == 1
    assert "It has astro, ml." in capsys.readouterr().err


# Headers.


@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), min_size=16, max_size=64))
def test_a_header_is_matched_by_its_own_value_alone(value: str) -> None:
    # nginx reads the pattern with PCRE, whose \x{…} is Python's \xHH.
    def pattern(service: str) -> list[re.Pattern[str]]:
        found = headers_of(service, {"astro": [value]})
        return [
            re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda m: f"\\x{int(m[1], 16):02x}", each)) for each, _ in found
        ]

    (bearer,) = pattern("ollama")
    assert bearer.fullmatch(f"Bearer {value}") and bearer.fullmatch(f"bearer {value}")
    assert not bearer.fullmatch(f"Bearer {value}x") and not bearer.fullmatch(value)
    assert value.swapcase() == value or not bearer.fullmatch(f"Bearer {value.swapcase()}")
    assert all('"' not in each.pattern for each in pattern("milvus"))


@pytest.mark.parametrize("value", ["short", "has a blank in it 0123", 'quote"0123456789abcdef', "nl\n0123456789abcdef"])
def test_token_of_the_environment_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("GPULAB_SECRET_PVE1_GPU01_TOKEN_OLLAMA_ASTRO", value)
    made = lab(tmp_path)
    with pytest.raises(GpulabError, match=r"token.ollama.astro of gpu01 is no bearer token") as said:
        proxy_of(made, made.guests["gpu01"])
    assert value not in str(said.value)


# What has to happen.


@pytest.fixture
def proxy(tmp_path: Path) -> Proxy:
    made = lab(tmp_path, access={"allow_from": ["192.0.2.0/24"], "burst": 0})
    return proxy_of(made, made.guests["gpu01"])


def state(proxy: Proxy, **keys: Any) -> dict[str, Any]:
    """nginx as it is after a deploy of `proxy`."""
    wanted = wanted_files(proxy, "1.26.3")
    secret = {
        path: {"sha256": hashlib.sha256(file.content.encode()).hexdigest(), "mode": file.mode, "uid": 0}
        for path, file in wanted.items()
        if file.secret
    }
    return {
        "packages": {"nginx": "1.26.3-3", "logrotate": "3.22"},
        "unit": {"load": "loaded", "enabled": "enabled", "active": "active", "skipped": False},
        "files": {path: wanted[path].content if path in wanted else None for path in SHOWN},
        "secret": secret,
        "left": sorted(path for path in wanted if path.startswith(f"{FOLDER}/")),
        "others": [CONFIGURATION],
        "running": generation_of(wanted),
        "version": "1.26.3",
        **keys,
    }


def test_nothing_has_to_happen_twice(proxy: Proxy) -> None:
    assert not decide(state(proxy), proxy).any()


def test_first_deploy_installs_and_starts(proxy: Proxy) -> None:
    actions = decide({}, proxy)
    assert actions.install == ["nginx", "logrotate"]
    assert actions.restart and actions.enable and actions.no_default and not actions.reload
    assert set(actions.files) == set(wanted_files(proxy, ""))


@pytest.mark.parametrize(
    ("keys", "reload", "restart"),
    [
        ({"running": "0123456789abcdef"}, "it runs with other files (0123456789abcdef)", ""),
        ({"running": None}, "", "it runs without our unit's settings"),
        ({"others": [CONFIGURATION, DEFAULT_SITE]}, "its files change", ""),
        ({"unit": {"enabled": "enabled", "active": "failed"}, "running": None}, "", "it is failed"),
        ({"left": [f"{FOLDER}/gone.tenants"]}, "its files change", ""),
    ],
)
def test_what_is_not_as_declared_is_put_right(proxy: Proxy, keys: dict[str, Any], reload: str, restart: str) -> None:
    actions = decide(state(proxy, **keys), proxy)
    assert (actions.reload, actions.restart) == (reload, restart)


@pytest.mark.parametrize("change", [{"mode": 0o644}, {"uid": 33}, {"sha256": 64 * "0"}])
def test_secret_file_that_differs_is_written_anew(proxy: Proxy, change: dict[str, Any]) -> None:
    found = state(proxy)
    found["secret"][KEY] |= change
    actions = decide(found, proxy)
    assert set(actions.files) == {KEY} and actions.reload


def test_masked_unit_is_somebodys_word(proxy: Proxy) -> None:
    with pytest.raises(GpulabError, match=r"nginx\.service is masked on the guest"):
        decide(state(proxy, unit={"enabled": "masked", "active": "inactive"}), proxy)
    # Ours, of an installation that was killed.
    assert decide(state(proxy, unit={"enabled": "masked-runtime", "active": "inactive"}), proxy).enable


def test_without_services_our_files_go_and_nginx_stops_if_it_is_ours_alone(proxy: Proxy) -> None:
    none = replace(proxy, services=(), pair=None)
    alone = decide(state(proxy), none)
    assert alone.stop and set(alone.files.values()) == {None} and CONFIGURATION in alone.files

    shared = decide(state(proxy, others=[CONFIGURATION, "/etc/nginx/conf.d/wiki.conf"]), none)
    assert not shared.stop and shared.reload == "our files go"

    theirs = state(proxy, files=dict.fromkeys(SHOWN), left=[], others=["/etc/nginx/conf.d/wiki.conf"])
    assert not decide(theirs, none).any()
    assert not decide({}, none).any()


@pytest.mark.parametrize(
    ("version", "distribution", "wants"),
    [
        ("1.22.1", "debian12", False),
        ("1.26.3", "debian13", True),
        ("1.25.0", "debian12", False),
        ("1.25.1", "debian12", True),
        ("1.28", "ubuntu2204", True),
        ("", "debian12", False),
        ("", "debian13", True),
        ("", "ubuntu2404", False),
    ],
)
def test_http2_is_said_as_this_nginx_understands_it(version: str, distribution: str, wants: bool) -> None:
    assert directive(version, distribution) == wants


def test_no_secret_stands_in_a_file_that_is_shown(proxy: Proxy) -> None:
    wanted = wanted_files(proxy, "1.26.3")
    shown = "".join(wanted[path].content for path in SHOWN)
    for file in [each for each in wanted.values() if each.secret]:
        parts = [line for line in file.content.splitlines() if len(line) > 20 and "gpulab" not in line]
        assert file.mode == 0o600 and parts and not any(line in shown for line in parts)
    assert proxy.salt in wanted[f"{FOLDER}/ollama.tenants"].content
    assert proxy.salt not in repr(proxy) and "PRIVATE KEY" not in repr(proxy)


# Rotation.


def test_words_choose_tokens(tmp_path: Path) -> None:
    made = lab(tmp_path)
    guest = made.guests["gpu01"]
    assert targets(made, guest, {}) == [Target("ollama", "astro")]
    assert targets(made, guest, {"tenant": "astro", "service": "ollama"}) == [Target("ollama", "astro")]
    assert targets(made, guest, {"tenant": "ml"}) == []
    with pytest.raises(GpulabError, match=r"tenant=nobody: no guest has such a tenant[\s\S]*astro, ml"):
        targets(made, guest, {"tenant": "nobody"})
    with pytest.raises(GpulabError, match=r"service=milvus: it has no bearer tokens"):
        targets(made, guest, {"service": "milvus"})


def test_previous_token_is_let_in_until_it_ends(tmp_path: Path) -> None:
    made = lab(tmp_path)
    guest, chosen = made.guests["gpu01"], [Target("ollama", "astro")]
    name = chosen[0].name

    def accepted(**keys: Any) -> int:
        return len(proxy_of(made, guest, **keys).services[0].headers)

    assert accepted() == 1
    secrets = Secrets(guest.state)
    begin(secrets, "pve1", "gpu01", chosen)
    assert (accepted(), accepted(without_previous=[name])) == (2, 1)
    begin(secrets, "pve1", "gpu01", chosen)
    end(secrets, "pve1", "gpu01", chosen)
    assert accepted() == 1 and secrets.get("pve1", previous_of(name), "gpu01") is None

# SPDX-License-Identifier: MIT
"""nginx in front of the services: TLS, a token a tenant, limits and a log of who did what; and the way back.

What of it is secret (headers of the tenants, the certificate's key) lies in a folder of root's. It travels to the guest
over stdin and never comes back: of those files the guest tells a SHA-256 only, and what could be guessed from one is
made longer by a line that nobody else knows.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from cryptography import x509
from pyinfra.api import StringCommand

from inventory import GpulabError, Guest, Lab
from inventory.access import BY_TOKEN, milvus_login, tenants_of, token
from inventory.secrets import Secrets, previous_of
from operations import apt, step
from operations.containers.authority import Authority, Pair
from operations.containers.facts import ProxyFacts
from operations.facts import python
from operations.files import File, render
from operations.plan import file_diff
from operations.remote import program
from operations.told import Told

#: logrotate turns nginx' logs over; the package of nginx only brings its settings.
PACKAGES = ("nginx", "logrotate")
UNIT = "nginx.service"
FOLDER = "/etc/nginx/gpulab"
CONFIGURATION = "/etc/nginx/conf.d/gpulab.conf"
DROP_IN = f"/etc/systemd/system/{UNIT}.d/gpulab.conf"
CERTIFICATE, KEY = f"{FOLDER}/server.pem", f"{FOLDER}/server.key"
#: systemd's resolver listens for its neighbours' questions (LLMNR, port 5355) unless it is told not to.
RESOLVER = "/etc/systemd/resolved.conf.d/gpulab.conf"
RUNTIME = "gpulab-proxy"
SOCKET = f"/run/{RUNTIME}/generation.sock"
#: Below the pattern of the logrotate settings that nginx' package brings: two weeks.
LOG = "/var/log/nginx/gpulab.log"
DEFAULT_SITE = "/etc/nginx/sites-enabled/default"
SHOWN = (CONFIGURATION, DROP_IN, RESOLVER, CERTIFICATE)

#: What users need of Ollama's API. Models are the inventory's: nothing that makes, copies or removes one.
OLLAMA_PATHS = (
    "/",
    *(f"/api/{name}" for name in ("chat", "embed", "embeddings", "generate", "ps", "show", "tags", "version")),
    *(f"/v1/{name}" for name in ("chat/completions", "completions", "embeddings", "messages", "models", "responses")),
)
OLLAMA_PATTERNS = (r"^/v1/models/[A-Za-z0-9._:/-]+$",)

#: From this version of nginx on HTTP/2 is a directive of its own, and the word behind `listen` a warning.
HTTP2_DIRECTIVE = (1, 25, 1)
#: Distributions whose nginx is older. It is asked for its version once it is installed.
OLDER = ("debian12", "ubuntu2204", "ubuntu2404")

#: A bearer token as RFC 6750 has it.
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]{16,}=*")
_APPLY = program(__file__, "proxy_state", "proxy")


@dataclass(frozen=True)
class Served:
    """One service behind the proxy. `headers`: what a tenant sends as `Authorization` (patterns), and who that is."""

    name: str
    port: int
    headers: Sequence[tuple[str, str]] = field(default=(), repr=False)
    grpc: bool = False
    paths: Sequence[str] = ()
    patterns: Sequence[str] = ()


@dataclass(frozen=True)
class Proxy:
    """What nginx shall do. `services` empty: nothing, and our files go. `salt`: a line that only the lab knows."""

    address: str
    distribution: str
    services: Sequence[Served] = ()
    pair: Pair | None = field(default=None, repr=False)
    salt: str = field(default="", repr=False)
    allowed: Sequence[str] = ()
    limits: Mapping[str, int] = field(default_factory=dict)
    #: Said of the certificate in the plan.
    signed_by: str = ""


@dataclass(frozen=True)
class Actions:
    """What has to happen. `files`: those that change; `reload`: why nginx has to take them up."""

    install: Sequence[str] = ()
    files: Mapping[str, File | None] = field(default_factory=dict)
    no_default: bool = False
    enable: bool = False
    reload: str = ""
    restart: str = ""
    stop: bool = False

    def any(self) -> bool:
        return bool(self.install or self.files or self.no_default or self.enable or self.reload or self.restart)


def proxy_of(lab: Lab, guest: Guest, without_previous: Collection[str] = ()) -> Proxy:
    """What the inventory and the lab's secrets make of it; secrets and certificates that are not there yet are made.

    + without_previous: names of secrets whose previous value no longer counts

    Raises:
        GpulabError: a token of the environment is none, or a file of the certificate can't be used.
    """
    access, address = guest.access, str(guest.address.ip)
    served = guest.services.served()
    if access is None or not served:
        return Proxy(address, guest.distribution)
    secrets, cluster = Secrets(guest.state), lab.node_of(guest).cluster_name
    services = []
    for name, service in served.items():
        tenants = {
            each: _accepted(secrets, cluster, token(name, each), guest.name, without_previous)
            for each in tenants_of(guest, name)
        }
        of_ollama = name == "ollama"
        services.append(
            Served(
                name,
                service.port,
                headers_of(name, tenants),
                grpc=name not in BY_TOKEN,
                paths=OLLAMA_PATHS if of_ollama else (),
                patterns=OLLAMA_PATTERNS if of_ollama else (),
            )
        )
    key = secrets.once(cluster, "containers.key")
    pair, signed_by = pair_of(guest)
    return Proxy(
        address,
        guest.distribution,
        services,
        pair,
        hmac.digest(key.encode(), f"proxy {guest.name}".encode(), "sha256").hex(),
        [str(network) for network in access.allow_from],
        access.model_dump(include={"requests_per_minute", "burst", "body_mib", "read_timeout_s"}),
        signed_by,
    )


def _accepted(secrets: Secrets, cluster: str, name: str, host: str, without_previous: Collection[str]) -> list[str]:
    """The secret, and the one before it as long as a rotation keeps it."""
    previous = None if name in without_previous else secrets.get(cluster, previous_of(name), host)
    found = [secrets.once(cluster, name, host), *([previous] if previous else [])]
    for value in found:
        if not _TOKEN.fullmatch(value) and name.startswith("token."):
            raise GpulabError(
                f"{name} of {host} is no bearer token",
                "Expected at least 16 letters, digits and ._~+/- (RFC 6750).",
            )
    return found


def headers_of(service: str, tenants: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Each value of `Authorization` that a tenant may send, as a pattern of nginx' map, and who it is.

    A pattern, because nginx ignores the case of plain values. Milvus takes base64 of `user:password`, as pymilvus
    sends it.
    """
    found = []
    for tenant, values in tenants.items():
        for value in values:
            if service in BY_TOKEN:
                found.append((f"^(?i:bearer) {_escaped(value)}$", tenant))
            else:
                login = base64.b64encode(milvus_login(tenant, value).encode()).decode()
                found.append((f"^{_escaped(login)}$", tenant))
    return found


def _escaped(text: str) -> str:
    """The text for a quoted pattern in a file of nginx, which has no variables in the first word of a map's line."""
    return "".join(char if re.fullmatch(r"[A-Za-z0-9_:-]", char) else f"\\x{{{ord(char):x}}}" for char in text)


def pair_of(guest: Guest) -> tuple[Pair, str]:
    """The certificate that nginx shows, and who signed it, in words."""
    assert guest.access is not None
    given = guest.access.pair_of_pems()
    if given is not None:
        return Pair(*given, until_of(given[0])), str(guest.access.certificate)
    authority = Authority(guest.services_ca.parent)
    names = [guest.name, str(guest.address.ip), *guest.access.names]
    return authority.issue(guest.name, list(dict.fromkeys(names))), f"the lab's CA, {authority.certificate}"


def until_of(pem: str) -> datetime:
    """When a certificate ends."""
    return x509.load_pem_x509_certificates(pem.encode())[0].not_valid_after_utc


def wanted_files(proxy: Proxy, version: str) -> dict[str, File]:
    """Every file of ours on the guest, none without services. `version`: nginx', empty: it is not installed yet."""
    if not proxy.services or proxy.pair is None:
        return {}
    secret = {
        f"{FOLDER}/{service.name}.tenants": File(
            render("containers/gpulab-tenants.j2", salt=proxy.salt, headers=service.headers), 0o600, secret=True
        )
        for service in proxy.services
    }
    secret[KEY] = File(proxy.pair.key, 0o600, secret=True)
    plain = {
        CERTIFICATE: File(proxy.pair.certificate),
        DROP_IN: File(render("containers/gpulab-nginx.service.j2", runtime=RUNTIME)),
        RESOLVER: File(render("containers/gpulab-resolved.conf.j2")),
    }
    values = {
        "services": proxy.services,
        "address": proxy.address,
        "allowed": proxy.allowed,
        "http2_directive": directive(version, proxy.distribution),
        "folder": FOLDER,
        "socket": SOCKET,
        "log": LOG,
        **proxy.limits,
    }
    text = render("containers/gpulab-nginx.conf.j2", generation="", **values)
    of_all = json.dumps([text, {path: file.content for path, file in sorted({**secret, **plain}.items())}])
    generation = hashlib.sha256(of_all.encode()).hexdigest()[:16]
    return {CONFIGURATION: File(text.replace('return 200 "\\n"', f'return 200 "{generation}\\n"')), **plain, **secret}


def directive(version: str, distribution: str) -> bool:
    """Does this nginx want HTTP/2 as a directive?"""
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)+", version):
        return distribution not in OLDER
    return tuple(map(int, version.split("."))) >= HTTP2_DIRECTIVE


def generation_of(files: Mapping[str, File]) -> str:
    """The generation that the configuration names, empty without one."""
    found = (
        re.search(r'return 200 "([0-9a-f]{16})\\n"', files[CONFIGURATION].content) if CONFIGURATION in files else None
    )
    return found[1] if found else ""


def differing(found: Mapping[str, Any], wanted: Mapping[str, File]) -> dict[str, File | None]:
    """The files that have to be written, or (None) to go."""
    changing: dict[str, File | None] = {}
    shown, secret = found.get("files", {}), found.get("secret", {})
    for path, file in wanted.items():
        if file.secret:
            as_it_should = {"sha256": hashlib.sha256(file.content.encode()).hexdigest(), "mode": file.mode, "uid": 0}
            if secret.get(path) != as_it_should:
                changing[path] = file
        elif shown.get(path) != file.content:
            changing[path] = file
    there = {*(path for path, text in shown.items() if text is not None), *found.get("left", [])}
    return changing | dict.fromkeys(sorted(there - wanted.keys()))


def decide(found: Mapping[str, Any], proxy: Proxy) -> Actions:
    """What has to happen for nginx to serve as declared.

    Raises:
        GpulabError: nginx is masked by somebody.
    """
    unit = found.get("unit", {})
    wanted = wanted_files(proxy, found.get("version", ""))
    files = differing(found, wanted)
    ours = {CONFIGURATION, DEFAULT_SITE}
    others = [path for path in found.get("others", []) if path not in ours]
    if not wanted:
        # Without a file of ours it is somebody else's nginx, or none.
        return Actions(files=files, stop=bool(files) and not others, reload="our files go" if files and others else "")
    if unit.get("enabled") == "masked":
        raise GpulabError(
            f"{UNIT} is masked on the guest, so nothing may start it",
            resolution=f"`systemctl unmask {UNIT}` in the guest, or `access` = None in the inventory",
        )
    install = apt.missing(found.get("packages", {}), PACKAGES)
    active = unit.get("active") == "active"
    restart = reload = ""
    if not active:
        restart = f"it is {unit.get('active') or 'absent'}"
    elif found["running"] is None:
        restart = "it runs without our unit's settings"
    elif files or DEFAULT_SITE in found["others"]:
        reload = "its files change"
    elif found["running"] != generation_of(wanted):
        reload = f"it runs with other files ({found['running']})"
    return Actions(
        install,
        files,
        no_default=DEFAULT_SITE in found.get("others", []) or "nginx" in install,
        enable=unit.get("enabled") != "enabled",
        reload=reload,
        restart=restart,
    )


@step.step
def proxy(wanted: Proxy) -> step.Commands:
    """
    Ensure that nginx alone lets the tenants in: on the guest's address, with TLS and a token for each service.

    New files are tried by nginx beside those that it runs with, and taken up by a reload: no request is dropped. nginx
    that refuses them goes on with those before. Without services of ours the files go; nginx stops if it serves nobody
    else.

    + wanted: what `proxy_of()` says
    """
    found = read(wanted)
    actions = decide(found, wanted)
    if not actions.any():
        step.noop(_as_it_is(wanted))
        return
    _record(found, actions, wanted)
    if "nginx" in actions.install:
        # Its package would start it with a page for everybody on port 80. Only until the next boot: a killed run
        # leaves nothing behind.
        yield StringCommand("systemctl", "mask", "--runtime", UNIT)
    if actions.install:
        yield apt.install(actions.install)
    yield applied(actions, wanted, found.get("version", ""))


def read(wanted: Proxy) -> dict[str, Any]:
    """nginx as it is; empty for a guest that does not exist yet."""
    secret = [KEY, *(f"{FOLDER}/{service.name}.tenants" for service in wanted.services)]
    found: dict[str, Any] = step.read(
        ProxyFacts, package_names=list(PACKAGES), shown=list(SHOWN), secret=secret, folder=FOLDER, socket_path=SOCKET
    )
    return found


def applied(actions: Actions, wanted: Proxy, version: str) -> StringCommand:
    """The command that tries the files, puts them in place and has nginx run with them."""
    payload = {
        path: file and {"content": base64.b64encode(file.content.encode()).decode(), "mode": file.mode}
        for path, file in actions.files.items()
    }
    order = {
        "folder": FOLDER,
        "socket": SOCKET,
        "scratch": "/run",
        "pid_file": "/run/nginx.pid",
        "log": LOG if wanted.services else "",
        "generation": generation_of(wanted_files(wanted, version)),
        "no_default": actions.no_default,
        "unit_changed": DROP_IN in actions.files,
        "resolver_changed": RESOLVER in actions.files,
        "restart": bool(actions.restart),
        "stop": actions.stop,
    }
    command = python(_APPLY, order)
    return Told(*command.bits, explain=_refused, _stdin=json.dumps(payload))


def _refused(output: str) -> GpulabError:
    """What the program on the guest said, its first line foremost."""
    brief, _, details = output.strip().partition("\n")
    return GpulabError(
        brief or "nginx could not be given its files",
        details,
        "`nginx -t` and `journalctl -u nginx` in the guest; the next deploy tries again",
    )


def _as_it_is(wanted: Proxy) -> str:
    if not wanted.services or wanted.pair is None:
        return "no service is served to the network"
    names = ", ".join(service.name for service in wanted.services)
    alone = "" if any(service.headers for service in wanted.services) else "; to nobody: there are no tenants"
    return f"nginx serves {names} on {wanted.address}, certificate until {wanted.pair.until:%Y-%m-%d}{alone}"


def _record(found: Mapping[str, Any], actions: Actions, wanted: Proxy) -> None:
    if actions.install:
        step.changes(f"install {', '.join(actions.install)}")
    for path, file in actions.files.items():
        if path == CERTIFICATE and file is not None and wanted.pair is not None:
            step.changes(f"file {path}", (f"until {wanted.pair.until:%Y-%m-%d}, signed by {wanted.signed_by}",))
        elif (file is not None and file.secret) or (file is None and path not in SHOWN):
            step.changes(f"file {path} (secret content)" if file else f"remove file {path}")
        else:
            lines = file_diff(found.get("files", {}).get(path), file.content if file else None)
            step.changes(f"file {path}" if file else f"remove file {path}", lines)
    if DEFAULT_SITE in found.get("others", []) and actions.no_default:
        step.changes(f"remove {DEFAULT_SITE}")
    if actions.enable:
        step.changes(f"enable {UNIT}")
    if actions.stop:
        step.changes(f"stop and disable {UNIT}: it serves nothing else")
    elif actions.restart:
        lost = ("requests in work are lost",) if found.get("unit", {}).get("active") == "active" else ()
        step.changes(f"start {UNIT}: {actions.restart}", lost)
    elif actions.reload:
        step.changes(f"reload {UNIT}: {actions.reload}")

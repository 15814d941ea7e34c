# SPDX-License-Identifier: MIT
"""A real nginx of this machine's distribution, unpacked and run below a folder, and the program that a guest runs.

What stands for the guest: the folder in place of `/`, and a script in place of systemctl.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from operations.containers.authority import Authority
from operations.containers.proxy import (
    DEFAULT_SITE,
    FOLDER,
    LOG,
    OLLAMA_PATHS,
    OLLAMA_PATTERNS,
    RUNTIME,
    SOCKET,
    Proxy,
    Served,
    generation_of,
    headers_of,
    wanted_files,
)
from operations.containers.remote import proxy as program
from rehearsal import paths

#: nginx listens here, and the services on 127.0.0.1, on the same ports.
ADDRESS = "127.0.0.2"
LIMITS = {"requests_per_minute": 6000, "burst": 100, "body_mib": 1, "read_timeout_s": 5}

_SYSTEMCTL = """#!/bin/sh
pid=$(cat {root}/run/nginx.pid 2>/dev/null)
running() {{ [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; }}
case "$1" in
    is-active) running && echo active || echo inactive ;;
    restart|start)
        if running; then {root}/bin/nginx -s stop; while kill -0 "$pid" 2>/dev/null; do sleep 0.05; done; fi
        mkdir -p {root}/run/{runtime}; rm -f {root}/run/{runtime}/*
        {root}/bin/nginx ;;
    reload|reload-or-restart) {root}/bin/nginx -s reload ;;
    stop|disable) if running; then {root}/bin/nginx -s stop; fi ;;
esac
"""


def unpacked() -> Path:
    """Debian's nginx below the cache, not installed: an installed one would open port 80 of this machine."""
    folder = paths.cache() / "nginx"
    if not (folder / "usr/sbin/nginx").exists():
        work = folder.with_name(f"nginx.{os.getpid()}")
        work.mkdir(parents=True, exist_ok=True)
        names = ["nginx", "nginx-common"]
        done = subprocess.run(["apt-get", "-q", "download", *names], cwd=work, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"apt-get download nginx: {done.stderr}")
        for package in work.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, work], check=True)
        if not folder.exists():
            work.rename(folder)
    return folder


@dataclass
class Guest:
    """A folder in place of a guest's root, with nginx in it."""

    root: Path
    authority: Authority

    def inside(self, text: str) -> str:
        """A file of ours, or a path, as it has to be below the folder."""
        for path in ("/etc/nginx/", "/run/gpulab-proxy", "/run/nginx", "/var/log/nginx/", "/etc/systemd/"):
            text = text.replace(path, f"{self.root}{path}")
        return text

    def order(self, proxy: Proxy, **keys: Any) -> tuple[dict[str, Any], program.Files]:
        wanted = wanted_files(proxy, "1.22.1")
        files: program.Files = {
            self.inside(path): {
                "content": base64.b64encode(self.inside(file.content).encode()).decode(),
                "mode": file.mode,
            }
            for path, file in wanted.items()
        }
        order = {
            "folder": self.inside(f"{FOLDER}/").rstrip("/"),
            "socket": self.inside(SOCKET),
            "scratch": str(self.root),
            "pid_file": str(self.root / "run/nginx.pid"),
            "log": self.inside(LOG),
            "generation": generation_of(wanted),
            "no_default": True,
            "unit_changed": False,
            "resolver_changed": False,
            "restart": False,
            "stop": False,
            "taken_s": 5.0,
        }
        return {**order, **keys}, files

    def apply(self, proxy: Proxy, **keys: Any) -> None:
        program.apply(*self.order(proxy, **keys))

    def nginx(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([self.root / "bin/nginx", *words], capture_output=True, text=True)

    def log(self) -> list[dict[str, Any]]:
        """The access log so far. nginx writes a line when a request has ended, after its client has seen that."""
        time.sleep(0.05)
        return [json.loads(line) for line in Path(self.inside(LOG)).read_text().splitlines()]

    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.authority.certificate))

    def connection(self, port: int, timeout: float = 10) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(ADDRESS, port, timeout=timeout, context=self.context())

    def ask(
        self,
        port: int,
        path: str,
        token: str | None = None,
        method: str = "GET",
        body: bytes | None = None,
        **headers: str,
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body."""
        connection = self.connection(port)
        try:
            connection.request(method, path, body, headers | ({"Authorization": f"Bearer {token}"} if token else {}))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def stop(self) -> None:
        pid = self.root / "run/nginx.pid"
        if not pid.exists() or not pid.read_text().strip():
            return
        self.nginx("-s", "stop")
        deadline = time.monotonic() + 10
        while pid.exists() and time.monotonic() < deadline:
            time.sleep(0.05)


@contextmanager
def guest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guest]:
    """An nginx that is installed and not started, with Debian's own default site.

    Its folder has a short name: that of a socket may have 107 bytes.
    """
    source, folder = unpacked(), Path(tempfile.mkdtemp(prefix="gpulab-"))
    made = Guest(folder, Authority(folder / "ca"))
    shutil.copytree(source / "etc/nginx", folder / "etc/nginx", symlinks=True)
    for name in (
        "bin",
        "run",
        "var/log/nginx",
        "etc/nginx/sites-enabled",
        "etc/nginx/modules-enabled",
        "var/lib/nginx",
    ):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "etc/nginx/sites-enabled/default").symlink_to("/nowhere")
    main = folder / "etc/nginx/nginx.conf"
    user = "root" if os.geteuid() == 0 else ""
    text = made.inside(main.read_text()).replace("user www-data;", f"user {user};" if user else "")
    main.write_text(text)
    temporary = [
        f"{name}_temp_path {folder}/var/lib/nginx/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    ]
    (folder / "etc/nginx/conf.d/temporary.conf").write_text("\n".join(temporary) + "\n")
    script(
        folder / "bin/nginx",
        f"""#!/bin/sh
case "$*" in *-c*) exec {source}/usr/sbin/nginx -e {folder}/var/log/nginx/error.log "$@" ;; esac
exec {source}/usr/sbin/nginx -e {folder}/var/log/nginx/error.log -c {main} "$@"
""",
    )
    script(folder / "bin/systemctl", _SYSTEMCTL.format(root=folder, runtime=RUNTIME))
    script(folder / "bin/journalctl", "#!/bin/sh\n")
    monkeypatch.setenv("PATH", f"{folder}/bin:{os.environ['PATH']}")
    monkeypatch.setattr(program, "ROOT", str(folder / "etc/nginx"))
    monkeypatch.setattr(program, "DEFAULT", made.inside(DEFAULT_SITE))
    try:
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder)


def script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def free_port() -> int:
    """A port that is free on the services' address and on nginx'."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
        other.bind((ADDRESS, port))
        return port


def served(name: str, port: int, tenants: dict[str, list[str]]) -> Served:
    ollama = name == "ollama"
    return Served(
        name,
        port,
        headers_of(name, tenants),
        grpc=not ollama,
        paths=OLLAMA_PATHS if ollama else (),
        patterns=OLLAMA_PATTERNS if ollama else (),
    )


def proxy_of(made: Guest, *services: Served, **keys: Any) -> Proxy:
    pair = made.authority.issue("gpu01", ["gpu01", ADDRESS])
    limits = {**LIMITS, **{key: keys.pop(key) for key in list(keys) if key in LIMITS}}
    return Proxy(ADDRESS, "debian12", services, pair, "salt", limits=limits, **keys)


class Backend(BaseHTTPRequestHandler):
    """A service: it says what it was asked, and streams parts with a pause between them."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[list[tuple[str, str, dict[str, str]]]] = []
    PARTS, PAUSE_S = 5, 0.2

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/chat":
            self.stream()
        else:
            self.answer()

    def answer(self) -> None:
        self.seen.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
        body = json.dumps({"path": self.path}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for number in range(self.PARTS):
            part = json.dumps({"part": number, "done": number == self.PARTS - 1}).encode() + b"\n"
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
            self.wfile.flush()
            self.pause()
        self.wfile.write(b"0\r\n\r\n")

    def pause(self) -> None:
        time.sleep(self.PAUSE_S)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def backend(port: int) -> Iterator[type[Backend]]:
    """The service on its loopback port."""
    handler = type("OneBackend", (Backend,), {"seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler
    finally:
        server.shutdown()
        server.server_close()

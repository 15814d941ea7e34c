# SPDX-License-Identifier: MIT
"""fakepve as a process of its own, and how the front asks it.

fakepve knows every endpoint's schema and PVE's wording for what breaks it, but it forgets everything when it ends.
So the front keeps the state and asks fakepve for the rest: parameters are verified by sending the same request to a
node that fakepve does not have (it looks at the parameters first), and endpoints the front does not know are
answered by fakepve alone.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import IO
from urllib.parse import quote

import aiohttp

from rehearsal.ca import Authority

# A node fakepve does not know: requests to it end after the parameter check.
_NO_NODE = "parameters-only"
# The only node fakepve has when its guest list is empty.
_FAKE_NODE = "pve1"
_START_TIMEOUT = 30.0
_API = "/api2/json"


class FakepveProcess:
    """A running fakepve on a loopback port; it ends with the process that started it."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        guests = folder / "guests.json"
        guests.write_text(json.dumps({"guests": []}))
        pair = authority.issue("fakepve", ["127.0.0.1"])
        self.password = secrets.token_hex(16)
        # setpriv: a front that is killed takes its fakepve along, so that none is left behind.
        self._process = subprocess.Popen(
            [
                "setpriv",
                "--pdeathsig",
                "KILL",
                sys.executable,
                "-m",
                "fakepve",
                str(guests),
                "--host",
                "127.0.0.1",
                "--port",
                "0",
                "--time-scale",
                "0",
                "--cert",
                str(pair.certificate),
                "--key",
                str(pair.key),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PVE_PASS": self.password},
        )
        assert self._process.stdout is not None
        self.url = self._wait_for_url(self._process.stdout)
        self.ca = authority.certificate

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_for_url(self, output: IO[str]) -> str:
        deadline = time.monotonic() + _START_TIMEOUT
        while time.monotonic() < deadline:
            line = output.readline()
            match = re.search(r"listening on (https://\S+)", line)
            if match:
                return match[1]
            if not line and self._process.poll() is not None:
                break
        self.stop()
        raise RuntimeError(f"fakepve did not start (exit status {self._process.returncode})")


class Upstream:
    """HTTP to fakepve; used from one event loop."""

    def __init__(self, process: FakepveProcess) -> None:
        self._process = process
        self._session: aiohttp.ClientSession | None = None
        self._headers: dict[str, str] = {}

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(
        self, method: str, path: str, query: str, body: bytes, content_type: str, *, verify_only: bool
    ) -> tuple[int, str, bytes]:
        """(status, reason, body) of fakepve's answer; with `verify_only` nothing happens beyond the check."""
        target = _with_node(path, _NO_NODE if verify_only else _FAKE_NODE)
        url = f"{self._process.url}{_API}{quote(target, safe='/:@!,')}{'?' + query if query else ''}"
        answer = await self._send(method, url, body, content_type)
        if answer[0] == 401:
            self._headers = {}
            answer = await self._send(method, url, body, content_type)
        if answer[0] == 401:
            raise RuntimeError(f"fakepve refuses its own administrator: {answer[1]}")
        return answer

    async def _send(self, method: str, url: str, body: bytes, content_type: str) -> tuple[int, str, bytes]:
        session = await self._logged_in()
        headers = {**self._headers, "Content-Type": content_type} if body else self._headers
        async with session.request(method, url, data=body or None, headers=headers) as response:
            return response.status, response.reason or "", await response.read()

    async def _logged_in(self) -> aiohttp.ClientSession:
        if self._session is None:
            context = ssl.create_default_context(cafile=str(self._process.ca))
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context))
        if not self._headers:
            login = {"username": "root@pam", "password": self._process.password}
            async with self._session.post(f"{self._process.url}{_API}/access/ticket", data=login) as response:
                data = (await response.json())["data"]
            self._headers = {
                "Cookie": f"PVEAuthCookie={data['ticket']}",
                "CSRFPreventionToken": data["CSRFPreventionToken"],
            }
        return self._session


def _with_node(path: str, node: str) -> str:
    return re.sub(r"^/nodes/[^/]+", f"/nodes/{node}", path)

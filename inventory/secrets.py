# SPDX-License-Identifier: MIT
"""Secrets of a lab: one private JSON file on the control machine, keyed by cluster, host and name.

An environment variable overrides the file: GPULAB_SECRET_<CLUSTER>_<HOST>_<NAME>, upper case, `-` written `_`
and the host left out for what belongs to the whole cluster (`GPULAB_SECRET_PVE1_API_TOKEN`).
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from inventory.errors import GpulabError

#: The host of a secret that belongs to the whole cluster.
CLUSTER = "-"


class Secrets:
    """The secrets file of one lab. Its values never enter a message, a log or a process list."""

    def __init__(self, state: Path) -> None:
        self.path = state / "secrets.json"

    def get(self, cluster: str, name: str, host: str = CLUSTER) -> str | None:
        """The secret, or None. The environment wins over the file."""
        return os.environ.get(variable(cluster, name, host)) or self._read().get(cluster, {}).get(host, {}).get(name)

    def put(self, cluster: str, name: str, value: str, host: str = CLUSTER) -> None:
        """Store the secret before it is used, so that a killed run cannot lose it."""
        with self._locked():
            self._put(cluster, name, value, host)

    def once(self, cluster: str, name: str, host: str = CLUSTER) -> str:
        """The secret; a random one is stored the first time that it is asked for, be it by a plan."""
        if (found := self.get(cluster, name, host)) is not None:
            return found
        with self._locked():
            # Another run may have been first.
            if (found := self.get(cluster, name, host)) is None:
                found = secrets.token_urlsafe(32)
                self._put(cluster, name, found, host)
        return found

    def rotate(self, cluster: str, name: str, host: str = CLUSTER) -> bool:
        """Store a new random secret and keep the one before it as `NAME.previous`, in one step.

        False, and nothing is stored: there is a previous one already, of a rotation that has not ended.

        Raises:
            GpulabError: the environment overrides the secret, so what is stored would not be used.
        """
        if (word := variable(cluster, name, host)) in os.environ:
            raise GpulabError(
                f"{name} of {host} is set by the environment variable {word}",
                resolution="change it there, or unset it and deploy: a stored one takes its place",
            )
        with self._locked():
            names = self._read().get(cluster, {}).get(host, {})
            if previous_of(name) in names:
                return False
            new = {name: secrets.token_urlsafe(32)}
            self._update(cluster, host, new | ({previous_of(name): names[name]} if name in names else {}))
        return True

    def drop(self, cluster: str, name: str, host: str = CLUSTER) -> None:
        """Forget a secret."""
        with self._locked():
            self._update(cluster, host, {name: None})

    def _put(self, cluster: str, name: str, value: str, host: str) -> None:
        self._update(cluster, host, {name: value})

    def _update(self, cluster: str, host: str, values: Mapping[str, str | None]) -> None:
        """Put in some values of a host, and take out those that are None."""
        content = self._read()
        kept = content.setdefault(cluster, {}).setdefault(host, {})
        kept.update({name: value for name, value in values.items() if value is not None})
        for name in values.keys() - {name for name, value in values.items() if value is not None}:
            kept.pop(name, None)
        temporary = self.path.with_suffix(".new")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "w") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(self.path)

    def values(self) -> list[str]:
        """Every stored value, for masking and for tests that look for leaks."""
        return [value for hosts in self._read().values() for names in hosts.values() for value in names.values()]

    def _read(self) -> dict[str, dict[str, dict[str, str]]]:
        try:
            mode = self.path.stat().st_mode & 0o777
        except FileNotFoundError:
            return {}
        if mode & 0o077:
            raise GpulabError(
                f"{self.path}: other users of this machine can read it (mode {mode:04o})",
                "Expected mode 0600.",
                f"chmod 600 {self.path}, and replace the secrets if others use this machine",
            )
        try:
            content: dict[str, dict[str, dict[str, str]]] = json.loads(self.path.read_text())
        except ValueError as error:
            raise GpulabError(f"{self.path}: not JSON ({error.__class__.__name__})") from None
        return content

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def previous_of(name: str) -> str:
    """Under which name the secret before a rotation is kept, until its successor has answered."""
    return f"{name}.previous"


def variable(cluster: str, name: str, host: str = CLUSTER) -> str:
    """The environment variable that overrides a secret."""
    parts = [cluster, *([] if host == CLUSTER else [host]), name]
    return "GPULAB_SECRET_" + "_".join(re.sub(r"[^A-Z0-9]", "_", part.upper()) for part in parts)

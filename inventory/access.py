# SPDX-License-Identifier: MIT
"""Who reaches the services from outside: the proxy's part of a guest's inventory, and what keeps the services healthy.

docs/access.md says what each key does.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from inventory.model import HttpUrl, Model

Network = Annotated[
    IPv4Network | IPv6Network, BeforeValidator(lambda value: ip_network(value) if isinstance(value, str) else value)
]


class Access(Model):
    """nginx in front of all services: TLS, one bearer token a tenant and service, limits, and a log of who did what.

    It listens on the guest's address, on each service's own port.
    """

    #: PEM files on the control machine: the certificate with its chain, and its key. None: the lab's own CA signs one
    #: for the guest's name and address.
    certificate: str | None = None
    key: str | None = None
    #: Names that the certificate of the lab's own CA holds beside the guest's name and address.
    names: list[str] = []
    #: Requests of one tenant to one service.
    requests_per_minute: int = Field(default=600, ge=1)
    #: How many may come at once beyond that pace; those beyond get HTTP 429.
    burst: int = Field(default=100, ge=0)
    #: The largest body of a request, MiB; larger ones get HTTP 413.
    body_mib: int = Field(default=64, ge=1)
    #: Seconds that a service may take between two parts of its answer: a model that is being loaded says nothing.
    read_timeout_s: int = Field(default=600, ge=1)
    #: Who may connect at all. Empty: everybody who reaches the address.
    allow_from: list[Network] = []

    @model_validator(mode="after")
    def pair(self) -> Access:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("`certificate` and `key` together")
        if self.certificate is not None and self.names:
            raise ValueError("`names` without `certificate`, which holds its own")
        return self


class Healing(Model):
    """A timer on the guest that restarts a service which has lost the GPU or does not answer."""

    #: Seconds between two looks.
    interval_s: int = Field(default=60, ge=5)
    #: After so many restarts of a service within `window_s` seconds no more are tried, and the alarm is raised.
    failures: int = Field(default=3, ge=1)
    window_s: int = Field(default=3600, ge=60)
    #: Seconds that a service has to get ready after its start, before it is looked at.
    grace_s: int = Field(default=120, ge=5)


class PythonIndex(Model):
    """Where pip on the guest finds packages."""

    url: HttpUrl
    #: PEM file on the control machine with the CA of that server. None: the guest's own CAs.
    ca: str | None = None

    @model_validator(mode="before")
    @classmethod
    def over_tls(cls, data: Any) -> Any:
        if isinstance(data, dict) and str(data.get("url", "")).startswith("http://"):
            raise ValueError("an https:// `url`: nothing else vouches for what it serves")
        return data

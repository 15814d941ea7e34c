# SPDX-License-Identifier: MIT
"""Who reaches the services from outside: the proxy's part of a guest's inventory, and what keeps the services healthy.

docs/access.md says what each key does.
"""

from __future__ import annotations

from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from inventory.model import HttpUrl, Model

if TYPE_CHECKING:
    from inventory.schema import Guest

#: Services that the proxy asks a bearer token for, one a tenant. Milvus checks its own header.
BY_TOKEN = ("ollama",)

HostName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9:]([A-Za-z0-9.:-]*[A-Za-z0-9])?$")]

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
    names: list[HostName] = []
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

    def pair_of_pems(self) -> tuple[str, str] | None:
        """The given certificate with its chain, and its key; None: the lab's own CA signs one.

        Raises:
            OSError: a file cannot be read.
        """
        if self.certificate is None or self.key is None:
            return None
        return Path(self.certificate).expanduser().read_text(), Path(self.key).expanduser().read_text()


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


def token(service: str, tenant: str) -> str:
    """The name of a tenant's bearer token among the secrets. Milvus: of its password."""
    return f"token.{service}.{tenant}" if service in BY_TOKEN else f"{service}.{tenant}"


def milvus_name(tenant: str) -> str:
    """A tenant's user in Milvus, and its database: Milvus takes letters, digits and underscores."""
    return tenant.replace("-", "_")


def milvus_login(tenant: str, password: str) -> str:
    """What a tenant shows to Milvus."""
    return f"{milvus_name(tenant)}:{password}"


def tenants_of(guest: Guest, service: str) -> list[str]:
    """Who may use a service."""
    return [tenant.name for tenant in guest.tenants if tenant.may_use(service)]


def trusted(guest: Guest) -> tuple[Path, str]:
    """What a client on the control machine checks the proxy's certificate with, and the name that it asks for.

    A given certificate is trusted itself: who signed it is its owner's affair.

    Raises:
        OSError, ValueError: the given certificate cannot be read, or is not for this guest.
    """
    address = str(guest.address.ip)
    if guest.access is None or guest.access.certificate is None:
        return guest.services_ca, address
    path = Path(guest.access.certificate).expanduser()
    found = known_as(names_of(x509.load_pem_x509_certificate(path.read_bytes())), guest)
    if found is None:
        raise ValueError(f"{path} is not for {guest.name}")
    return path, found


def names_of(certificate: x509.Certificate) -> list[str]:
    """The host names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def known_as(names: list[str], guest: Guest) -> str | None:
    """Which of a certificate's names stands for the guest: its address, its name, or its name in some domain."""
    if str(guest.address.ip) in names:
        return str(guest.address.ip)
    for name in names:
        if name.partition(".")[0].lower() == guest.name:
            return name
    if guest.searchdomain and f"*.{guest.searchdomain}" in names:
        return f"{guest.name}.{guest.searchdomain}"
    return None


def problems(guest: Guest, now: datetime | None = None) -> list[str]:
    """What keeps the given certificate from being used: lines of the inventory's errors."""
    access = guest.access
    if access is None or access.certificate is None:
        return []
    now = now or datetime.now(UTC)
    try:
        pems = access.pair_of_pems()
    except (OSError, UnicodeDecodeError) as error:
        file = getattr(error, "filename", None) or "certificate, key"
        return [f"access: {file}: {getattr(error, 'strerror', None) or 'not a PEM file'}; expected a PEM file"]
    assert pems is not None
    try:
        certificate = x509.load_pem_x509_certificates(pems[0].encode())[0]
    except ValueError:
        return [f"access.certificate = {access.certificate!r}: expected a certificate in PEM"]
    try:
        key = serialization.load_pem_private_key(pems[1].encode(), None)
    except (ValueError, TypeError):
        # Its text is not shown.
        return [f"access.key = {access.key!r}: expected a private key in PEM, without a passphrase"]
    found = []
    if _public(key.public_key()) != _public(certificate.public_key()):
        found.append(f"access.key = {access.key!r}: expected the key of {access.certificate}; it is another's")
    if now >= certificate.not_valid_after_utc:
        found.append(
            f"access.certificate = {access.certificate!r}: expected one that is valid; it expired on "
            f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        )
    if now < certificate.not_valid_before_utc:
        found.append(
            f"access.certificate = {access.certificate!r}: expected one that is valid; it will be from "
            f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on"
        )
    names = names_of(certificate)
    if known_as(names, guest) is None:
        found.append(
            f"access.certificate = {access.certificate!r}: expected one for {guest.name} or {guest.address.ip}; "
            f"it is for {', '.join(names) or 'no name'}"
        )
    return found


def _public(key: Any) -> bytes:
    return key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)

# SPDX-License-Identifier: MIT
"""The lab's own certificate authority: made once, then it signs the API fronts and the image registry.

It plays the part of a Proxmox cluster's CA (`/etc/pve/pve-root-ca.pem`): clients verify against `ca.pem`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LIFETIME = datetime.timedelta(days=3650)
# Certificates are valid from a day back, so that a host whose clock lags a little accepts them.
BACKDATED = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Issued:
    """Paths of a certificate (with the CA behind it, as a chain) and its key, both PEM; the key is mode 0600."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """A CA in a folder: `ca.pem`, `ca.key`, and the pairs it issued as `NAME.pem`, `NAME.key`."""

    folder: Path

    @property
    def certificate(self) -> Path:
        """The file clients verify against."""
        return self.folder / "ca.pem"

    def issue(self, name: str, sans: Sequence[str]) -> Issued:
        """The pair called `name` for these host names and addresses; made anew unless one fits already."""
        issued = Issued(self.folder / f"{name}.pem", self.folder / f"{name}.key")
        if self._fits(issued, sans):
            return issued
        authority = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        authority_key = serialization.load_pem_private_key((self.folder / "ca.key").read_bytes(), None)
        if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
            raise TypeError(f"{self.folder / 'ca.key'} is not an elliptic-curve key")
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(name, authority.subject, key.public_key())
            .add_extension(x509.SubjectAlternativeName([_general_name(san) for san in sans]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            # Python 3.13 verifies strictly (RFC 5280) and refuses a leaf without this identifier.
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        _write_private(issued.key, _pem_key(key))
        pem = certificate.public_bytes(serialization.Encoding.PEM)
        issued.certificate.write_bytes(pem + self.certificate.read_bytes())
        return issued

    def _fits(self, issued: Issued, sans: Sequence[str]) -> bool:
        if not (issued.key.exists() and issued.certificate.exists()):
            return False
        chain = issued.certificate.read_bytes()
        return chain.endswith(self.certificate.read_bytes()) and _sans_of(issued.certificate) == set(sans)


def authority(folder: Path) -> Authority:
    """The CA kept in `folder`, made there the first time."""
    ca = Authority(folder)
    if ca.certificate.exists() and (folder / "ca.key").exists():
        return ca
    folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name("gpulab rehearsal CA (simulated)")
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _builder("gpulab rehearsal CA (simulated)", subject, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_private(folder / "ca.key", _pem_key(key))
    ca.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return ca


def _builder(name: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + LIFETIME)
    )


def _name(common: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "gpulab rehearsal"),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _general_name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _sans_of(path: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return {str(name.value) for name in names}


def _pem_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_private(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)

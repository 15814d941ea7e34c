# SPDX-License-Identifier: MIT
"""The lab's own certificate authority for its services: made once on the control machine, in the lab's private folder.

Users verify against `ca.pem`; the keys never leave this folder but for the guest whose certificate they make.
"""

from __future__ import annotations

import datetime
import fcntl
import ipaddress
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from inventory import GpulabError
from inventory.access import names_of

CA_DAYS = 3650
#: Some clients refuse a longer life (398 days, CA/Browser Forum).
LEAF_DAYS = 397
#: Days before its end at which a certificate is made anew by any deploy; verify fails later than that.
RENEW_DAYS = 60
#: Certificates are valid from a day back: a client whose clock lags accepts them.
BACKDATED = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its key: PEM texts. `until`: when it ends."""

    certificate: str
    key: str
    until: datetime.datetime


class Authority:
    """A CA in a folder: `ca.pem`, `ca.key`, and what it issued as `NAME.pem`, `NAME.key`; keys have mode 0600."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def certificate(self) -> Path:
        """The file that users verify against."""
        return self.folder / "ca.pem"

    def issue(self, name: str, names: Sequence[str], now: datetime.datetime | None = None) -> Pair:
        """The pair called `name` for these host names and addresses; made anew unless one fits and lasts.

        Raises:
            GpulabError: the CA itself has ended, or its files are damaged.
        """
        now = now or datetime.datetime.now(datetime.UTC)
        names = [str(_general(each).value) for each in names]
        with self._locked():
            try:
                authority, key = self._authority(now)
                return self._fitting(name, names, authority, now) or self._made(name, names, authority, key, now)
            except ValueError:
                raise GpulabError(
                    f"{self.folder}: a file of the lab's CA is damaged",
                    resolution=f"restore {self.folder} from a backup; without one remove it, and users need the new CA",
                ) from None

    def _authority(self, now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        path = self.folder / "ca.key"
        if not path.exists():
            return self._founded(path, now)
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError("not an elliptic-curve key")
        if not self.certificate.exists():
            # A run that was killed between the two: nobody has been given the certificate yet.
            return self._founded(path, now)
        certificate = x509.load_pem_x509_certificate(self.certificate.read_bytes())
        left = certificate.not_valid_after_utc - now
        if left < datetime.timedelta(days=LEAF_DAYS):
            raise GpulabError(
                f"{self.certificate} ends on {certificate.not_valid_after_utc:%Y-%m-%d}: no certificate of "
                f"{LEAF_DAYS} days can be signed with it",
                resolution=f"move {self.folder} away and deploy: users then need the new {self.certificate}",
            )
        return certificate, key

    def _founded(self, path: Path, now: datetime.datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = _name("gpulab services CA")
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
            _builder(subject, subject, key.public_key(), now, CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(path, _pem_of_key(key), 0o600)
        _write(self.certificate, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
        return certificate, key

    def _fitting(
        self, name: str, names: Sequence[str], authority: x509.Certificate, now: datetime.datetime
    ) -> Pair | None:
        pem, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        if not (pem.exists() and key.exists()):
            return None
        certificate = x509.load_pem_x509_certificates(pem.read_bytes())[0]
        private = serialization.load_pem_private_key(key.read_bytes(), None)
        try:
            certificate.verify_directly_issued_by(authority)
        except Exception:  # InvalidSignature, TypeError, ValueError: of another CA in any case
            return None
        lasts = certificate.not_valid_after_utc - now > datetime.timedelta(days=RENEW_DAYS)
        if not lasts or set(names_of(certificate)) != set(names) or private.public_key() != certificate.public_key():
            return None
        return Pair(pem.read_text(), key.read_text(), certificate.not_valid_after_utc)

    def _made(
        self,
        name: str,
        names: Sequence[str],
        authority: x509.Certificate,
        authority_key: ec.EllipticCurvePrivateKey,
        now: datetime.datetime,
    ) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(name), authority.subject, key.public_key(), now, LEAF_DAYS)
            .add_extension(x509.SubjectAlternativeName([_general(each) for each in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            # Python 3.13 verifies strictly (RFC 5280) and refuses a leaf without this identifier.
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
            )
            .sign(authority_key, hashes.SHA256())
        )
        # The CA's own stands behind it: some clients are given the chain's end alone.
        chain = certificate.public_bytes(serialization.Encoding.PEM) + self.certificate.read_bytes()
        _write(self.folder / f"{name}.key", _pem_of_key(key), 0o600)
        _write(self.folder / f"{name}.pem", chain, 0o644)
        return Pair(chain.decode(), _pem_of_key(key).decode(), certificate.not_valid_after_utc)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _general(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _pem_of_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    temporary = path.with_name(f"{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with open(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)

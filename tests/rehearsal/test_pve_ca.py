# SPDX-License-Identifier: MIT
"""The lab's certificate authority."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509

from rehearsal import ca


def test_authority_is_made_once_and_keeps_its_keys_private(tmp_path: Path) -> None:
    first = ca.authority(tmp_path)
    text = first.certificate.read_bytes()
    assert ca.authority(tmp_path).certificate.read_bytes() == text
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600


def test_pair_is_kept_until_its_names_change(tmp_path: Path) -> None:
    authority = ca.authority(tmp_path)
    first = authority.issue("pve1", ["pve1", "10.66.0.11"]).certificate.read_bytes()
    assert authority.issue("pve1", ["10.66.0.11", "pve1"]).certificate.read_bytes() == first
    second = authority.issue("pve1", ["pve1", "10.66.0.12"]).certificate.read_bytes()
    assert second != first
    names = x509.load_pem_x509_certificate(second).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert {str(name.value) for name in names.value} == {"pve1", "10.66.0.12"}


def test_pair_of_an_authority_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    old = ca.authority(tmp_path).issue("pve1", ["pve1"]).certificate.read_bytes()
    (tmp_path / "ca.pem").unlink()
    assert ca.authority(tmp_path).issue("pve1", ["pve1"]).certificate.read_bytes() != old

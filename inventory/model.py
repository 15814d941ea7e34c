# SPDX-License-Identifier: MIT
"""What all models of an inventory are made of: the strict base, and the words that several of them use."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
AbsolutePath = Annotated[str, StringConstraints(pattern=r"^/[A-Za-z0-9._/-]*$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
HttpUrl = Annotated[str, StringConstraints(pattern=r"^https?://[^\s]+[^/\s]$")]


class Model(BaseModel):
    """Strict: an unknown key or a value of another type is an error, never a guess."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True)


def require_trust(url: str, key: str, digest: str | None) -> None:
    """
    Raises:
        ValueError: packages would come from `url`, without TLS, under a signing key that nobody vouches for.
    """
    if url.startswith("http://") and digest is None:
        raise ValueError(f"`{key}` beside {url}: without TLS it is the only root of trust")

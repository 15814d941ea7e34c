# SPDX-License-Identifier: MIT
"""Docker's package repository for Debian 12, in the lab: its layout, names and relations, with Debian's Docker inside.

`service.py` builds and serves it, `packages.py` says what its packages hold.
"""

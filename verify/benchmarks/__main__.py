# SPDX-License-Identifier: MIT
"""Prints the whole program: `python -m verify.benchmarks | ssh GUEST python3 -I - --quick`."""

from __future__ import annotations

import sys

from verify.benchmarks import program

sys.stdout.write(program())

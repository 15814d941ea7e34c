# SPDX-License-Identifier: MIT
"""Benchmarks that prove the card performs, tier 0: one program for the guest's own Python."""

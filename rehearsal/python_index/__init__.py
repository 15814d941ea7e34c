# SPDX-License-Identifier: MIT
"""A Python package index for the lab's guests: `service.py` fills and serves it."""

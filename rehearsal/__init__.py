# SPDX-License-Identifier: MIT
"""The rehearsal lab: what stands in for hardware, and nothing else does."""

# SPDX-License-Identifier: MIT
"""Container engine, CDI and the services in the guest."""

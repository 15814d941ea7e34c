# SPDX-License-Identifier: MIT
"""A Proxmox VE node's API for the rehearsal lab: a small stateful front before one fakepve process per node.

fakepve knows the API's schema and says what is wrong with a request's parameters; the front keeps what must last
(VMs, volumes, mappings, users) and turns power changes into containers.
"""

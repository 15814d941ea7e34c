# SPDX-License-Identifier: MIT
"""Every promise of an inventory, checked from outside: `pytest verify --lab inventory/lab.py`.

One folder a subject. `remote.py` of a subject runs on the host and reads; `test_*.py` judges what was read.
"""

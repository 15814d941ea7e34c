# SPDX-License-Identifier: MIT
"""What changes a lab: one package a subject, each with facts (reads), pure decisions and operations."""

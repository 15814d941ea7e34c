# SPDX-License-Identifier: MIT
"""The GPU measured on its guest, and what the figures mean.

`contract` reads what gpubench printed, `intervals` and `changes` are the statistics, `references` judges a figure,
`history` keeps a lab's own figures, `judging` puts them together.
"""

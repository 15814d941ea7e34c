# SPDX-License-Identifier: MIT
"""`lab/milvus`: `recipe.py` builds the image, `entry.py` runs inside it."""

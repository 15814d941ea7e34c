# SPDX-License-Identifier: MIT
"""`lab/ollama`: `recipe.py` builds the image, the other modules run inside it."""

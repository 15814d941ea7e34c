# SPDX-License-Identifier: MIT
"""A language model small enough for a test: random weights, real GGUF, half a megabyte, no licence to mind."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy

LAYERS = 2
WIDTH = 64
HEADS = 4
FEED_FORWARD = 128
#: Tokens of its "training": more than any inventory of the lab declares.
CONTEXT = 32768
SEED = 20261122


def write_tiny(path: Path) -> None:
    """Write the model to `path`. The bytes are the same each time."""
    generator = numpy.random.default_rng(SEED)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny random model (simulated)")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    # 2 unknown, 3 control, 6 byte.
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)

    def weights(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", (generator.standard_normal(shape) * 0.05).astype(numpy.float32))

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, dtype=numpy.float32))

    weights("token_embd", len(tokens), WIDTH)
    weights("output", len(tokens), WIDTH)
    norm("output_norm")
    for block in range(LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights(f"blk.{block}.{part}", WIDTH, WIDTH)
        weights(f"blk.{block}.ffn_gate", FEED_FORWARD, WIDTH)
        weights(f"blk.{block}.ffn_up", FEED_FORWARD, WIDTH)
        weights(f"blk.{block}.ffn_down", WIDTH, FEED_FORWARD)
        norm(f"blk.{block}.attn_norm")
        norm(f"blk.{block}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

"""How the ranks of tensor parallelism share a tensor, told by its key: Megatron-LM's names, those of before Core too.

A column-parallel layer has a share of the rows of its weight and of its bias, a row-parallel one a share of the columns
of its weight; its bias, norms, the router and position embeddings are the same in all ranks
(``megatron/core/tensor_parallel/layers.py``).  A gated first layer of an MLP (SwiGLU) has in each rank its share of the
gate's rows, then that of the other half.  Query, key and value lie together head by head, so that the rows of all
ranks, one after another, are the whole.
"""

from __future__ import annotations

import re

_ROWS = re.compile(
    r"""(?:.*\.)?(?:query_key_value|key_value|query|linear_qkv|linear_q|linear_kv|linear_[qkv]+_up_proj|linear_[qkv]_proj
        |dense_h_to_4h|linear_fc1|output_layer|word_embeddings|word_embeddings_for_head)\.(?:weight|bias)
        |(?:.*\.)?lm_head\.bias""",
    re.VERBOSE,
)
_COLUMNS = re.compile(
    r"(?:.*\.)?(?:attention\.dense|self_attention\.dense|inter_attention\.dense|dense_4h_to_h|linear_proj|linear_fc2)\.weight"
)
_FIRST = re.compile(r"(?P<before>(?:.*\.)?)(?P<name>dense_h_to_4h|linear_fc1)\.(?:weight|bias)")
_SECOND = {"dense_h_to_4h": "dense_4h_to_h.weight", "linear_fc1": "linear_fc2.weight"}
VOCABULARY = re.compile(r"(?:.*\.)?(?:word_embeddings|word_embeddings_for_head|output_layer)\.(?:weight|bias)")


def shared_dim(key: str) -> int | None:
    """The dimension along which the ranks share a tensor; None where all of them have the same one.

    >>> key = "decoder.layers.0.self_attention.linear_{}"
    >>> [shared_dim(key.format(end)) for end in ("qkv.weight", "qkv.layer_norm_weight", "proj.weight", "proj.bias")]
    [0, None, 1, None]
    """
    if _ROWS.fullmatch(key):
        return 0
    return 1 if _COLUMNS.fullmatch(key) else None


def second_layer(key: str) -> str:
    """The key of the weight of an MLP's second layer, for a key of its first; "" for any other key.

    >>> second_layer("decoder.layers.0.mlp.linear_fc1.bias")
    'decoder.layers.0.mlp.linear_fc2.weight'
    """
    found = _FIRST.fullmatch(key)
    return found["before"] + _SECOND[found["name"]] if found else ""

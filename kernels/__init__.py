"""GPU and CPU kernels of ModalTune: torch in, torch out.

Inert on purpose: transformers imports a module called `kernels` when it finds one on the path, so
importing this package does nothing. Public functions are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

_LAZY = {
    "OutOfReachError": "_dispatch",
    "alibi_attention": "alibi_attn",
    "dilated_attention": "dilated_attn",
    "embed_positions": "position_embed",
    "extract": "extraction",
    "frozen_ffn": "frozen_feedforward",
    "frozen_linear": "frozen_product",
    "frozen_qkv": "frozen_product",
    "gated_pool": "gated_pooling",
    "inject": "injection",
    "inject_tasks": "injection",
    "known_product_choice": "frozen_product",
    "normalize_tiles": "tile_norm",
    "packed_bytes": "frozen_product",
    "pathway_mlp": "grouped_mlp",
    "pin_products": "frozen_product",
    "product_choice": "frozen_product",
    "product_libraries": "frozen_product",
}

__all__ = list(_LAZY)

if TYPE_CHECKING:
    from modaltune.kernels._dispatch import OutOfReachError as OutOfReachError
    from modaltune.kernels.alibi_attn.api import alibi_attention as alibi_attention
    from modaltune.kernels.dilated_attn.api import dilated_attention as dilated_attention
    from modaltune.kernels.extraction.api import extract as extract
    from modaltune.kernels.frozen_feedforward.api import frozen_ffn as frozen_ffn
    from modaltune.kernels.frozen_product.api import frozen_linear as frozen_linear
    from modaltune.kernels.frozen_product.api import frozen_qkv as frozen_qkv
    from modaltune.kernels.frozen_product.api import known_product_choice as known_product_choice
    from modaltune.kernels.frozen_product.api import packed_bytes as packed_bytes
    from modaltune.kernels.frozen_product.api import pin_products as pin_products
    from modaltune.kernels.frozen_product.api import product_choice as product_choice
    from modaltune.kernels.frozen_product.api import product_libraries as product_libraries
    from modaltune.kernels.gated_pooling.api import gated_pool as gated_pool
    from modaltune.kernels.grouped_mlp.api import pathway_mlp as pathway_mlp
    from modaltune.kernels.injection.api import inject as inject
    from modaltune.kernels.injection.api import inject_tasks as inject_tasks
    from modaltune.kernels.position_embed.api import embed_positions as embed_positions
    from modaltune.kernels.tile_norm.api import normalize_tiles as normalize_tiles


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    home = _LAZY[name] if _LAZY[name].startswith("_") else f"{_LAZY[name]}.api"
    return getattr(importlib.import_module(f"{__name__}.{home}"), name)

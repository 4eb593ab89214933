"""How the new weights of a small model start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modaltune.modalities import PathwayNetworks
from modaltune.model import ModalTune
from modaltune.slide_encoders.longnet import LongNet


def start_at_unit_gain(model: ModalTune, tiles: Tensor | None, gain: float = 0.3) -> None:
    """Start a small model at unit gain, and its random encoder on standardised features.

    The published standard deviation of 0.02 is made for inputs 768 wide; at 96 and less it leaves
    every signal a hundredth of its bias. The random patch embedding stands in for a pretrained one:
    it sees features standardised over the training tiles.

    Args:
        model: Changed in place; weights are drawn from torch's global generator.
        tiles: `[N, in_features]` tile features of training cases; None without images.
        gain: Size of embedded tiles.
    """
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.startswith("slide_encoder") or ".attn." in name:
                continue
            if isinstance(module, nn.Linear):
                module.weight.normal_(0, module.in_features**-0.5)
            elif isinstance(module, PathwayNetworks):
                sizes = module.offsets.diff()
                per_row = sizes.repeat_interleave(sizes).unsqueeze(1).float()
                module.weight1.normal_().mul_(per_row**-0.5)
                module.weight2.normal_(0, module.weight2.shape[-1] ** -0.5)
        encoder = model.slide_encoder
        if tiles is not None and isinstance(encoder, LongNet):
            features = tiles.float()
            mean, spread = features.mean(0), features.std(0) + 1e-6
            weight = torch.randn_like(encoder.patch_embed.weight) * features.shape[1] ** -0.5
            encoder.patch_embed.weight.copy_(gain * weight / spread)
            encoder.patch_embed.bias.copy_(-encoder.patch_embed.weight @ mean)

"""The named rival: METHOD written down literally, with the best ordinary library calls.

Nothing is shared, folded or fused beyond what a library call does: torch's linear layers, norms and
fused attention; gather, pad, fused attention (ATen's, with its log-sum-exp) and scatter for each
branch of dilated attention; one small network after the other for 331 pathways; separate query, key
and value projections; a full forward pass for each task, the outputs put together, then loss and
backward, as published. Dropout is left out. Under the masks of a shared trunk (METHOD 8) it still
runs a pass for each task. It takes the weights of a `ModalTune` and gives the same numbers; it
passes the golden files itself (`tests/test_literal_model.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from modaltune.batch import CaseBatch
from modaltune.errors import InputError
from modaltune.modalities import GeneModality
from modaltune.model import ModalTune
from modaltune.reference_import import model_rules, model_to_reference
from modaltune.slide_encoders.longnet import LongNet
from modaltune.targets import distillation_loss

_NO_ATTENTION = -1e8
_EPS = 1e-5


@dataclass(frozen=True)
class Shape:
    """The options that a state_dict does not tell (published names in METHOD 3)."""

    trunk_heads: int
    adapter_heads: int
    segment_lengths: tuple[int, ...]
    dilation_ratios: tuple[int, ...]
    interactions: tuple[tuple[int, int], ...]
    grid_cells: int
    cell_px: int
    tasks: int
    token_agg: str
    hides_task: bool
    global_pool: bool
    gene_tokens: int


class LiteralModel:
    """The model over a published-layout state.

    Args:
        model: Ours, on a LongNet and with genes; its frozen weights are shared, the trainable ones
            are copied.

    Attributes:
        weights: Tensors by published name; trainable ones are leaves that need a gradient.
        trainable: Names of the trainable ones.

    Raises:
        InputError: The model has no LongNet, or no genes.
    """

    def __init__(self, model: ModalTune) -> None:
        encoder, genes = model.slide_encoder, dict(model.modalities.items()).get("genes")
        if not isinstance(encoder, LongNet) or not isinstance(genes, GeneModality):
            raise InputError("the literal model must have a LongNet and genes, got another form")
        tuned = {name for name, p in model.named_parameters() if p.requires_grad}
        self.trainable = [
            name
            for rule in model_rules(model)
            if set(rule.ours) <= tuned
            for name in rule.published
        ]
        self.weights: dict[str, Tensor] = {}
        for name, tensor in model_to_reference(model).items():
            own = tensor.detach()
            is_tuned = name in self.trainable
            self.weights[name] = own.clone().requires_grad_() if is_tuned else own
        self.gene_lists = [
            genes.encoder.networks.gene_index[a:b]
            for a, b in pairwise(genes.encoder.networks.offsets.tolist())
        ]
        config, trunk = model.config, encoder.config
        self.shape = Shape(
            trunk_heads=trunk.heads,
            adapter_heads=config.adapter.heads,
            segment_lengths=trunk.segment_lengths,
            dilation_ratios=trunk.dilation_ratios,
            interactions=config.adapter.interactions,
            grid_cells=trunk.grid_cells,
            cell_px=trunk.cell_px,
            tasks=len(config.tasks),
            token_agg=config.token_agg,
            hides_task=config.task_trunk == "shared",
            global_pool=config.global_pool,
            gene_tokens=0 if config.genes is None else config.genes.tokens,
        )

    def __call__(self, batch: CaseBatch) -> Tensor:
        """Return embeddings `[1, tasks, out]` of one case: a full forward pass for each task."""
        outputs = [self.forward_task(batch, task) for task in range(self.shape.tasks)]
        return torch.cat(outputs).unsqueeze(0)

    def train_step(
        self, batch: CaseBatch, targets: Tensor, optimizer: torch.optim.Optimizer
    ) -> tuple[Tensor, Tensor]:
        """Take one step as published: all forwards, loss, backward, AdamW; return outputs, loss."""
        optimizer.zero_grad(set_to_none=True)
        outputs = self(batch)
        loss = distillation_loss(outputs, targets).mean()
        loss.backward()
        optimizer.step()
        return outputs.detach(), loss.detach()

    def parameters(self) -> list[Tensor]:
        """Return the trainable tensors."""
        return [self.weights[name] for name in self.trainable]

    def forward_task(self, batch: CaseBatch, task: int) -> Tensor:
        """Return the embedding `[1, out]` of a case (METHOD 3.1 to 3.8)."""
        modal, names = self._modal_tokens(batch.modalities, task)
        x = self._embed(batch.tiles, batch.positions_px)
        cls_token = self.weights["cls_token"]
        first = self.shape.interactions[0][0]
        x = torch.cat([cls_token, x], dim=1)
        for i in range(first):
            x = self._layer(i, x)
        cls_token, x = x[:, :1], x[:, 1:]
        last = len(self.shape.interactions) - 1
        for n, (start, end) in enumerate(self.shape.interactions):
            if f"prompt_selfattention.{n}.norm.weight" in self.weights:
                modal = self._self_attention(n, modal, names)
            x = self._injector(n, x, modal, names)
            x = torch.cat([cls_token, x], dim=1)
            for i in range(start, end + 1):
                x = self._layer(i, x)
            cls_token, x = x[:, :1], x[:, 1:]
            modal = self._extractor(f"interactions.{n}.extractor.", modal, x)
            for i in range(2):
                at = f"interactions.{n}.extra_extractors.{i}."
                if n == last and f"{at}attn.norm.weight" in self.weights:
                    modal = self._extractor(at, modal, x)
        return self._head(cls_token, x, modal, names)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        return F.linear(x, weight.flatten(1), self.weights[f"{name}.bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, _EPS)

    def _embed(self, tiles: Tensor, positions_px: Tensor) -> Tensor:
        """METHOD 3.1; rows of the position table are computed, as the table would be 3 GB."""
        n, quarter = self.shape.grid_cells, self.weights["cls_token"].shape[-1] // 4
        cell = torch.div(positions_px, self.shape.cell_px, rounding_mode="floor").long()
        index = cell[:, 0] * n + cell[:, 1]
        steps = torch.arange(quarter, dtype=torch.float64, device=tiles.device)
        waves = 10000.0 ** (-steps / quarter)
        angles = [at.double()[:, None] * waves for at in (index % n, index // n)]
        rows = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], dim=1)
        return (self._linear("patch_embed.proj", tiles) + rows.to(tiles.dtype)).unsqueeze(0)

    def _layer(self, i: int, x: Tensor) -> Tensor:
        """METHOD 3.2."""
        at = f"encoder.layers.{i}."
        normed = self._norm(f"{at}self_attn_layer_norm", x)
        q, k, v = (
            self._linear(f"{at}self_attn.{name}_proj", normed).unflatten(
                -1, (self.shape.trunk_heads, -1)
            )
            for name in "qkv"
        )
        attended = dilated_attention(
            q[0], k[0], v[0], self.shape.segment_lengths, self.shape.dilation_ratios
        )
        attended = self._norm(f"{at}self_attn.inner_attn_ln", attended.flatten(1)[None])
        x = x + self._linear(f"{at}self_attn.out_proj", attended)
        wide = F.gelu(self._linear(f"{at}ffn.fc1", self._norm(f"{at}final_layer_norm", x)))
        return x + self._linear(f"{at}ffn.fc2", self._norm(f"{at}ffn.ffn_layernorm", wide))

    def _gene_tokens(self, expression: Tensor) -> Tensor:
        """METHOD 3.4: `[1, M]` to `[1, tokens, D]`, pathway by pathway."""
        rows = []
        for i, genes in enumerate(self.gene_lists):
            at = f"gene_encoder.gene_networks.{i}."
            hidden = F.elu(self._linear(f"{at}0.0", expression[:, genes]))
            rows.append(F.elu(self._linear(f"{at}1.0", hidden)))
        x = torch.stack(rows, dim=1)
        depth = 0
        while f"gene_encoder.mlp_mixer.{depth}.0.norm.weight" in self.weights:
            at = f"gene_encoder.mlp_mixer.{depth}."
            mixed = self._norm(f"{at}0.norm", x).transpose(1, 2)
            mixed = self._linear(f"{at}0.fn.3", F.gelu(self._linear(f"{at}0.fn.0", mixed)))
            x = x + mixed.transpose(1, 2)
            wide = F.gelu(self._linear(f"{at}1.fn.0", self._norm(f"{at}1.norm", x)))
            x = x + self._linear(f"{at}1.fn.3", wide)
            depth += 1
        x = self._norm(f"gene_encoder.mlp_mixer.{depth}", x)
        x = self._linear(f"gene_encoder.mlp_mixer.{depth + 1}", x)
        return self._linear("gene_encoder.pathway_compression", x.transpose(1, 2)).transpose(1, 2)

    def _modal_tokens(
        self, modalities: Mapping[str, Tensor], task: int
    ) -> tuple[Tensor, list[str]]:
        """METHOD 3.5: tokens `[1, G, D]` and what each of them is."""
        parts, names = [], []
        if "clinical_mlp.0.weight" in self.weights:
            hidden = F.relu(self._linear("clinical_mlp.0", modalities["clinical"]))
            token = self._norm("clinical_mlp.3", self._linear("clinical_mlp.2", hidden))
            parts.append(token.unsqueeze(1))
            names.append("clinical")
        if self.shape.tasks > 1:
            weight = self.weights["task_weight.0.weight"]
            onehot = torch.eye(self.shape.tasks, dtype=weight.dtype, device=weight.device)
            token = self._linear("task_weight.0", onehot[None, task : task + 1])
            parts.append(self._norm("task_weight.1", token))
            names.append("task")
        if "gene_cls" in self.weights:
            parts.append(self.weights["gene_cls"])
            names.append("cls")
        parts.append(self._gene_tokens(modalities["genes"]))
        names += ["gene"] * self.shape.gene_tokens
        return torch.cat(parts, dim=1), names

    def _attend(
        self, at: str, inner: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """METHOD 3.6: multi-head attention with its outer maps, `[1, L, D]` each."""
        has_outer = f"{at}q_proj.weight" in self.weights
        if has_outer:
            q = self._linear(f"{at}q_proj", q)
            maps = [self.weights[f"{at}{inner}.{name}_proj_weight"] for name in "qkv"]
        else:
            maps = list(self.weights[f"{at}{inner}.in_proj_weight"].chunk(3))
        biases = self.weights[f"{at}{inner}.in_proj_bias"].chunk(3)
        q, k, v = (
            F.linear(t, weight, bias).unflatten(-1, (self.shape.adapter_heads, -1)).transpose(1, 2)
            for t, weight, bias in zip((q, k, v), maps, biases, strict=True)
        )
        out = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        out = self._linear(f"{at}{inner}.out_proj", out)
        return self._linear(f"{at}output_proj", out) if has_outer else out

    def _injector(self, n: int, x: Tensor, modal: Tensor, names: list[str]) -> Tensor:
        at = f"interactions.{n}.injector."
        kv = self._norm(f"{at}attn.norm_kq", modal) + self.weights["gene_pe"]
        if self.shape.hides_task:
            kv = kv[:, [i for i, name in enumerate(names) if name != "task"]]
        query = self._norm(f"{at}attn.norm", x)
        seen = x + self._attend(f"{at}attn.", "multihead_attn", query, kv, kv)
        return x + self.weights[f"{at}gamma"] * seen

    def _extractor(self, at: str, modal: Tensor, x: Tensor) -> Tensor:
        query = self._norm(f"{at}attn.norm", modal) + self.weights["gene_pe"]
        kv = self._norm(f"{at}attn.norm_kq", x)
        seen = modal + self._attend(f"{at}attn.", "multihead_attn", query, kv, kv)
        modal = modal + seen
        if f"{at}ffn.linear1.weight" not in self.weights:
            return modal
        hidden = F.relu(self._linear(f"{at}ffn.linear1", self._norm(f"{at}ffn.norm", modal)))
        return modal + self._linear(f"{at}ffn.linear2", hidden)

    def _self_attention(self, n: int, modal: Tensor, names: list[str]) -> Tensor:
        at = f"prompt_selfattention.{n}."
        normed = self._norm(f"{at}norm", modal)
        placed = normed + self.weights["gene_pe"]
        mask = None
        if self.shape.hides_task:  # from all but itself
            is_task = torch.tensor([name == "task" for name in names], device=modal.device)
            mask = ~is_task[None, :] | is_task[:, None]
        return modal + self._attend(at, "self_attn", placed, placed, normed, mask)

    def _head(self, cls_token: Tensor, x: Tensor, modal: Tensor, names: list[str]) -> Tensor:
        """METHOD 3.8."""
        slots = [x.mean(dim=1) if self.shape.global_pool else cls_token[:, 0]]
        genes = "cls" if "cls" in names else "gene"
        for wanted in ("task", genes, "clinical"):
            at = [i for i, name in enumerate(names) if name == wanted]
            if at:
                slots.append(modal[:, at].mean(dim=1))
        joined = torch.cat(slots, 1) if self.shape.token_agg == "cat" else torch.stack(slots).sum(0)
        return self._linear("final_project", self._norm("final_norm", joined))


def dilated_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], ratios: tuple[int, ...]
) -> Tensor:
    """Attend in every branch of METHOD 3.3 and merge: `[T, H, d]` each to `[T, H, d]`."""
    branches = [_branch(q, k, v, w, r) for w, r in zip(segments, ratios, strict=True)]
    with torch.no_grad():
        alphas = torch.softmax(torch.stack([lse for _, lse in branches]), dim=0).to(q.dtype)
    merged = torch.zeros_like(q)
    for alpha, (out, _) in zip(alphas, branches, strict=True):
        merged = merged + alpha.unsqueeze(-1) * out
    return merged


def _fused_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return ATen's fused attention and its log-sum-exp, `[B, H, m, d]` and `[B, H, m]`."""
    aten = torch.ops.aten
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    elif q.dtype.itemsize == 2:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:  # flash attention takes 16 bits only; this one pads its log-sum-exp
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[:2]
    return out, lse[..., : q.shape[2]]


def _branch(q: Tensor, k: Tensor, v: Tensor, segment: int, ratio: int) -> tuple[Tensor, Tensor]:
    """Return one branch's output `[T, H, d]` and log-sum-exp `[T, H]`."""
    length, heads, dim = q.shape
    w = min(segment, length)
    n, m, per_group = math.ceil(length / w), math.ceil(w / ratio), math.ceil(heads / ratio)

    def gather(t: Tensor) -> Tensor:
        t = F.pad(t, (0, 0, 0, ratio * per_group - heads, 0, n * w - length))
        t = F.pad(t.view(n, w, -1, dim), (0, 0, 0, 0, 0, m * ratio - w))
        t = t.view(n, m, ratio, ratio, per_group, dim).diagonal(dim1=2, dim2=3)
        return t.permute(0, 4, 2, 1, 3).reshape(n, ratio * per_group, m, dim).contiguous()

    def scatter(t: Tensor, fill: float) -> Tensor:
        t = t.view(n, ratio, per_group, m, -1)
        full = t.new_full((n, m, ratio, ratio, per_group, t.shape[-1]), fill)
        full.diagonal(dim1=2, dim2=3).copy_(t.permute(0, 3, 2, 4, 1))
        return full.view(n * m * ratio, ratio * per_group, -1)[:length, :heads]

    out, lse = _fused_attention(gather(q), gather(k), gather(v))
    lse = torch.where(lse == 0.0, _NO_ATTENTION, lse)
    return scatter(out, 0.0), scatter(lse, _NO_ATTENTION).squeeze(-1)

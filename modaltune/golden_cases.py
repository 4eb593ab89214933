"""How each kind of golden case is recomputed with our own modules.

Every function takes the stored inputs and the case's JSON and returns its answers under the stored
names. Inputs are read through a mapping that remembers what was read, so that a tensor nobody
looked at can be reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from modaltune import reference_import as ref
from modaltune.adapter import Extractor, Injector, PromptSelfAttention
from modaltune.errors import InputError
from modaltune.evaluate import golden_evaluation
from modaltune.kernels import embed_positions
from modaltune.modalities import GeneConfig, PathwayEncoder
from modaltune.model import set_impl
from modaltune.reference_config import longnet_from_reference, segments_from_reference
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig, LongNetLayer
from modaltune.slide_encoders.protocol import SlideTokens
from modaltune.targets import distillation_loss, load_reference_projector
from modaltune.train import epoch_rate
from modaltune.train_config import TrainConfig

Meta = Mapping[str, Any]
Answers = dict[str, Tensor]


class Inputs(dict[str, Tensor]):
    """Stored tensors by name; remembers which were read."""

    def __init__(
        self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__(
            {
                k: t.to(device, dtype if t.is_floating_point() else t.dtype)
                for k, t in tensors.items()
            }
        )
        self.dtype = dtype
        self.device = torch.device(device)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.read.add(name)
        return super().__getitem__(name)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Return all tensors below a prefix, without it."""
        return {name[len(prefix) :]: self[name] for name in self if name.startswith(prefix)}

    def genes(self) -> tuple[Tensor, list[int]]:
        """Return the pathway vectors, one behind the other `[1, nnz]`, and their sizes."""
        count = sum(name.startswith("in/genes.") for name in self)
        parts = [self[f"in/genes.{i}"] for i in range(count)]
        return torch.cat(parts, dim=1), [p.shape[1] for p in parts]


def load_module(module: nn.Module, rules: list[ref.Rule], weights: ref.State, name: str) -> None:
    """Load published weights into the part of `module` that the rules cover, strictly."""
    state = module.state_dict()
    module.load_state_dict({**state, **ref.from_published(rules, weights, state, name)})


def gradients(module: nn.Module, rules: list[ref.Rule]) -> Answers:
    """Return the gradients of a module's parameters under their published names."""
    named = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    return {f"grad/{k}": g for k, g in ref.to_published(rules, named).items()}


def _leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


def injector(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Injector alone: tiles `query` attend to modal tokens `feat`."""
    module = Injector(meta["dim"], meta["num_heads"], _bottleneck(meta)).to(
        inputs.device, inputs.dtype
    )
    rules = ref.injector_rules("", "", module)
    load_module(module, rules, inputs.group("weights/"), meta["name"])
    set_impl(module, impl)
    query, feat, pos = (_leaf(inputs[f"in/{n}"]) for n in ("query", "feat", "pos"))
    tokens = SlideTokens(query[0], torch.tensor([0, query.shape[1]]), num_prefix=0)
    y = module(tokens, feat, pos, None).x[None]
    (y * inputs["in/grad_out"]).sum().backward()
    grads = {f"grad_in/{n}": t.grad for n, t in (("query", query), ("feat", feat), ("pos", pos))}
    return {"out/y": y, **_present(grads), **gradients(module, rules)}


def extractor(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Extractor alone: modal tokens `query` attend to tiles `feat`."""
    module = Extractor(meta["dim"], meta["num_heads"], _bottleneck(meta), 0.0).to(
        inputs.device, inputs.dtype
    )
    rules = ref.extractor_rules("", "", module)
    load_module(module, rules, inputs.group("weights/"), meta["name"])
    set_impl(module, impl)
    query, feat, pos = (_leaf(inputs[f"in/{n}"]) for n in ("query", "feat", "pos"))
    tokens = SlideTokens(feat[0], torch.tensor([0, feat.shape[1]]), num_prefix=0)
    y = module(query, pos, tokens)
    (y * inputs["in/grad_out"]).sum().backward()
    grads = {f"grad_in/{n}": t.grad for n, t in (("query", query), ("feat", feat), ("pos", pos))}
    return {"out/y": y, **_present(grads), **gradients(module, rules)}


def prompt_selfattention(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Prompt self-attention alone."""
    del impl  # plain torch: a few dozen tokens
    module = PromptSelfAttention(meta["dim"], meta["num_heads"], _bottleneck(meta))
    module = module.to(inputs.device, inputs.dtype)
    rules = ref.self_attention_rules("", "", module)
    load_module(module, rules, inputs.group("weights/"), meta["name"])
    tgt, pos = _leaf(inputs["in/tgt"]), _leaf(inputs["in/query_pos"])
    y = module(tgt, pos, None)
    (y * inputs["in/grad_out"]).sum().backward()
    grads = {"grad_in/tgt": tgt.grad, "grad_in/query_pos": pos.grad}
    return {"out/y": y, **_present(grads), **gradients(module, rules)}


def gene_encoder(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Pathway networks, mixer and compression."""
    genes, sizes = inputs.genes()
    config = GeneConfig(
        width=meta["latent_dim"],
        depth=meta["depth"],
        token_expansion=meta["expansion_groups"],
        channel_expansion=meta["expansion_dim"],
        tokens=meta["final_groups"],
    )
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    module = PathwayEncoder(torch.arange(genes.shape[1]), offsets, meta["output_dim"], config)
    module = module.to(inputs.device, inputs.dtype).eval()
    rules = ref.gene_rules("", "", module)
    load_module(module, rules, inputs.group("weights/"), meta["name"])
    set_impl(module, impl)
    genes = _leaf(genes)
    networks = module.networks(genes, 0.0)
    mixed = module.mix(networks)
    y = module(genes)
    (y * inputs["in/grad_out"]).sum().backward()
    answers = {"out/y": y, "mid/snn": networks, "mid/mixer": mixed}
    if genes.grad is not None:
        parts = genes.grad.split(sizes, dim=1)
        answers.update({f"grad_in/genes.{i}": part for i, part in enumerate(parts)})
    return {**answers, **gradients(module, rules)}


def _layer(meta: Meta, ffn: int, inputs: Inputs) -> LongNetLayer:
    config = LongNetConfig(
        in_features=1,
        width=meta["D"],
        depth=1,
        heads=meta["heads"],
        ffn_width=ffn,
        segment_lengths=segments_from_reference(meta),
        dilation_ratios=tuple(meta["dilated_ratio"]),
    )
    return LongNetLayer(config, 0.0).to(inputs.device, inputs.dtype).eval()


def dilated(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Dilated self-attention with its projections and inner norm."""
    layer = _layer(meta, meta["D"], inputs)
    rules = ref.layer_attention_rules("", "")
    load_module(layer, rules, inputs.group("weights/"), meta["name"])
    layer.impl = impl
    x = _leaf(inputs["in/x"])
    merged = layer.attend(x[0], torch.tensor([0, x.shape[1]]))
    y = layer.out_proj(layer.attn_inner_norm(merged))[None]
    (y * inputs["in/grad_out"]).sum().backward()
    answers = {"out/y": y, "mid/pre_subln": merged[None], **_present({"grad/x": x.grad})}
    return {**answers, **gradients(layer, rules)}


def longnet_layer(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """One whole LongNet layer."""
    layer = _layer(meta, meta["ffn"], inputs)
    rules = ref.layer_rules("", "")
    load_module(layer, rules, inputs.group("weights/"), meta["name"])
    layer.impl = impl
    x = _leaf(inputs["in/x"])
    y = layer(SlideTokens(x[0], torch.tensor([0, x.shape[1]]))).x[None]
    (y * inputs["in/grad_out"]).sum().backward()
    return {"out/y": y, **_present({"grad/x": x.grad}), **gradients(layer, rules)}


def pos_embed(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Rows of the position table for given coordinates, and its first row."""
    config = {"in_chans": 1, "embed_dim": meta["D"], "depth": 1, "longnet": {"heads": 1}}
    encoder = LongNet(longnet_from_reference({**meta, **config}))
    cells = encoder.cells(inputs["in/coords"][0])
    rows = embed_positions(
        torch.zeros(len(cells), meta["D"], dtype=inputs.dtype, device=inputs.device),
        cells,
        torch.zeros(meta["D"], dtype=inputs.dtype, device=inputs.device),
        impl=impl,
    )
    index = cells[:, 0] * meta["slide_ngrids"] + cells[:, 1] + 1
    return {"out/pos": index[None], "out/rows": rows[1:], "out/row0": rows[:1]}


def projector_kl(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Text projector and distillation loss at several temperatures."""
    del impl  # plain torch
    projector = load_reference_projector(inputs.group("projector/"), prefix="").to(inputs.device)
    text = inputs["in/text"]
    logits = _leaf(inputs["in/logits"])
    normalised = projector.project(text)
    target = normalised[list(meta["label_rows"])][None]
    answers = {"mid/text_projected": projector(text), "mid/text_normalised": normalised}
    for name in (n for n in inputs if n.startswith("out/loss")):
        tau = meta["temperature"] if name == "out/loss" else float(name[len("out/loss_T") :])
        answers[name] = distillation_loss(logits[None], target, tau, meta["factor"])
    answers["out/loss"].sum().backward()
    return {**answers, **_present({"grad/logits": logits.grad})}


def evaluation(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Logistic and Cox probes; metrics come as `metrics/<task>.<name>`."""
    del impl
    arrays = {name: inputs[name].cpu().numpy() for name in inputs if name.startswith("in/")}
    found = golden_evaluation(arrays, meta)
    return {name: torch.from_numpy(np.array(value)) for name, value in found.items()}


def lr_schedule(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Learning rates of every epoch in the training loop, for each stored number of epochs.

    Under torch 2.13 the published code runs the cosine 2 / (1 + cos(pi / (E - W))) times higher
    (METHOD 4.3); that list is ours times the factor.
    """
    del inputs, impl
    warmup = meta["warmup_epochs"]
    answers = {}
    for epochs in sorted({*meta["lrs_torch_2_0"], *meta.get("lrs_torch_2_13", {})}, key=int):
        recipe = TrainConfig(
            epochs=int(epochs),
            lr=meta["lr"],
            warmup_epochs=warmup,
            warmup_factor=meta["warmup_factor"],
        )
        rates = torch.tensor(
            [epoch_rate(recipe, epoch) for epoch in range(int(epochs) + 1)], dtype=torch.float64
        )
        answers[f"lrs_torch_2_0/{epochs}"] = rates
        raised = rates.clone()
        if int(epochs) > warmup:
            raised[warmup + 1 :] *= 2 / (1 + math.cos(math.pi / (int(epochs) - warmup)))
        answers[f"lrs_torch_2_13/{epochs}"] = raised
    return answers


def _bottleneck(meta: Meta) -> float | None:
    return float(meta["cffn_ratio"]) if meta["with_cffn"] else None


def _present(tensors: Mapping[str, Tensor | None]) -> Answers:
    return {name: t for name, t in tensors.items() if t is not None}


def run_kind(inputs: Inputs, meta: Meta, impl: str) -> Answers:
    """Recompute one case of any kind.

    Raises:
        InputError: The kind is unknown.
    """
    from modaltune.golden_model import full_model

    kinds: dict[str, Callable[[Inputs, Meta, str], Answers]] = {
        "full_model": full_model,
        "injector": injector,
        "extractor": extractor,
        "prompt_selfattention": prompt_selfattention,
        "gene_encoder": gene_encoder,
        "dilated_attention": dilated,
        "longnet_encoder_layer": longnet_layer,
        "pos_embed": pos_embed,
        "projector_kl_loss": projector_kl,
        "evaluation": evaluation,
        "lr_schedule": lr_schedule,
    }
    if meta.get("kind") not in kinds:
        raise InputError(f"kind must be one of {sorted(kinds)}, got {meta.get('kind')!r}")
    answers = kinds[meta["kind"]](inputs, meta, impl)
    return {name: tensor.detach().cpu() for name, tensor in answers.items()}

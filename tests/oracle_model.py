"""METHOD 3 and 8 read literally: one case, one task, float64, loops; knows no modaltune."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (3, 1, 5, 2)  # genes per pathway
BASE: dict[str, Any] = {
    "in_chans": 5,
    "embed_dim": 16,
    "depth": 5,
    "slide_ngrids": 12,
    "segment_length": [8, 16, 32],
    "dilated_ratio": [1, 2, 4],
    "longnet": {"heads": 4, "ffn_dim": 24},
    "num_heads": 2,
    "output_dim": 7,
    "interaction_indexes": [[0, 1], [2, 3]],  # the fifth layer is never run
    "with_cffn": True,
    "cffn_ratio": 0.5,
    "use_extra_extractor": True,
    "use_prompt_sa": True,
    "prompt_agg": "avg",
    "token_agg": "sum",
    "multi_task": 3,
    "clinical": False,
    "clinfeat_dim": 4,
    "global_pool": False,
    "gene": {
        "latent_dim": 6,
        "depth": 2,
        "expansion_groups": 0.5,
        "expansion_dim": 0.5,
        "final_groups": 3,
    },
}


def published_shapes(o: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published state_dict, from METHOD 3 and 7."""
    d, ffn, latent = o["embed_dim"], o["longnet"]["ffn_dim"], o["gene"]["latent_dim"]
    inner, count, groups = int(d * o["cffn_ratio"]), len(SIZES), o["gene"]["final_groups"]
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, d)}

    def linear(name: str, out: int, into: int, *tail: int) -> None:
        shapes.update({f"{name}.weight": (out, into, *tail), f"{name}.bias": (out,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def attention(name: str, mha: str) -> None:
        e = inner if o["with_cffn"] else d
        shapes[f"{name}{mha}.in_proj_bias"] = (3 * e,)
        linear(f"{name}{mha}.out_proj", e, e)
        if o["with_cffn"]:
            for letter, width in (("q", e), ("k", d), ("v", d)):
                shapes[f"{name}{mha}.{letter}_proj_weight"] = (e, width)
            linear(f"{name}q_proj", e, d)
            linear(f"{name}output_proj", d, e)
        else:
            shapes[f"{name}{mha}.in_proj_weight"] = (3 * d, d)
        norm(f"{name}norm", d)

    linear("patch_embed.proj", d, o["in_chans"])
    for i in range(o["depth"]):
        at = f"encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{at}self_attn.{name}", d, d)
        for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
            norm(at + name, d)
        linear(f"{at}ffn.fc1", ffn, d)
        linear(f"{at}ffn.fc2", d, ffn)
        norm(f"{at}ffn.ffn_layernorm", ffn)
    norm("encoder.layer_norm", d)
    norm("norm", d)
    last = len(o["interaction_indexes"]) - 1
    for n in range(last + 1):
        at = f"interactions.{n}."
        shapes[f"{at}injector.gamma"] = (d,)
        extra = 2 if n == last and o["use_extra_extractor"] else 0
        extractors = ["extractor.", *(f"extra_extractors.{i}." for i in range(extra))]
        for part in ("injector.", *extractors):
            attention(f"{at}{part}attn.", "multihead_attn")
            norm(f"{at}{part}attn.norm_kq", d)
        for part in extractors if o["with_cffn"] else ():
            linear(f"{at}{part}ffn.linear1", inner, d)
            linear(f"{at}{part}ffn.linear2", d, inner)
            norm(f"{at}{part}ffn.norm", d)
        if n and o["use_prompt_sa"]:
            attention(f"prompt_selfattention.{n}.", "self_attn")
    for i, size in enumerate(SIZES):
        linear(f"gene_encoder.gene_networks.{i}.0.0", latent, size)
        linear(f"gene_encoder.gene_networks.{i}.1.0", latent, latent)
    for i in range(o["gene"]["depth"]):
        at = f"gene_encoder.mlp_mixer.{i}."
        linear(f"{at}0.fn.0", count // 2, count, 1)
        linear(f"{at}0.fn.3", count, count // 2, 1)
        linear(f"{at}1.fn.0", latent // 2, latent)
        linear(f"{at}1.fn.3", latent, latent // 2)
        norm(f"{at}0.norm", latent)
        norm(f"{at}1.norm", latent)
    norm(f"gene_encoder.mlp_mixer.{o['gene']['depth']}", latent)
    linear(f"gene_encoder.mlp_mixer.{o['gene']['depth'] + 1}", d, latent)
    linear("gene_encoder.pathway_compression", groups, count)
    multi, cls = o["multi_task"] > 1, o["prompt_agg"] == "cls"
    shapes["gene_pe"] = (groups + multi + cls + o["clinical"], d)
    if multi:
        linear("task_weight.0", d, o["multi_task"])
        norm("task_weight.1", d)
    if cls:
        shapes["gene_cls"] = (1, 1, d)
    if o["clinical"]:
        linear("clinical_mlp.0", d // 2, o["clinfeat_dim"])
        linear("clinical_mlp.2", d, d // 2)
        norm("clinical_mlp.3", d)
    slots = 2 + multi + o["clinical"] if o["token_agg"] == "cat" else 1
    norm("final_norm", d * slots)
    linear("final_project", o["output_dim"], d * slots)
    return shapes


def random_state(o: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Weights that are nowhere degenerate: matrices keep scale, norms and gamma are off 1 and 0."""
    torch.manual_seed(seed)
    state = {}
    for name, shape in published_shapes(o).items():
        value = torch.randn(shape, dtype=torch.float64)
        is_norm = len(shape) == 1 and name.endswith(".weight")
        scale = 0.2 if len(shape) == 1 else 1 / math.sqrt(shape[1])
        state[name] = value * scale + (1.0 if is_norm else 0.0)
    return state


def lin(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"]


def ln(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def dilated(q: Tensor, k: Tensor, v: Tensor, heads: int, o: dict[str, Any]) -> Tensor:
    """METHOD 3.3, position by position group; segments here are multiples of their ratio."""
    rows, dim = q.shape[0], q.shape[1] // heads
    outs, lses = [], []
    for w, r in zip(o["segment_length"], o["dilated_ratio"], strict=True):
        w = min(w, rows)
        n, m, per_group = math.ceil(rows / w), math.ceil(w / r), math.ceil(heads / r)
        out = torch.zeros(n * m * r, heads, dim, dtype=q.dtype)
        lse = torch.full((n * m * r, heads), -1e8, dtype=q.dtype)
        for s in range(n):
            for h in range(heads):
                places = [h // per_group + r * i for i in range(m)]

                def take(
                    t: Tensor, h: int = h, s: int = s, w: int = w, at: list[int] = places
                ) -> Tensor:
                    zero = torch.zeros(dim, dtype=t.dtype)
                    here = [s * w + p if p < w and s * w + p < rows else None for p in at]
                    cut = t[:, h * dim : (h + 1) * dim]
                    return torch.stack([zero if i is None else cut[i] for i in here])

                scores = take(q) @ take(k).T / math.sqrt(dim)
                where = torch.tensor(places) + s * m * r
                out[where, h] = torch.softmax(scores, 1) @ take(v)
                lse[where, h] = torch.log(torch.exp(scores).sum(1)).detach()
        lse[lse == 0.0] = -1e8
        outs.append(out[:rows])
        lses.append(lse[:rows])
    alpha = torch.softmax(torch.stack(lses), 0)
    return sum(a[:, :, None] * b for a, b in zip(alpha, outs, strict=True)).flatten(1)


def layer(w: dict[str, Tensor], i: int, t: Tensor, o: dict[str, Any]) -> Tensor:
    at = f"encoder.layers.{i}."
    u = ln(w, f"{at}self_attn_layer_norm", t)
    q, k, v = (lin(w, f"{at}self_attn.{c}_proj", u) for c in "qkv")
    mixed = ln(w, f"{at}self_attn.inner_attn_ln", dilated(q, k, v, o["longnet"]["heads"], o))
    h = t + lin(w, f"{at}self_attn.out_proj", mixed)
    wide = gelu(lin(w, f"{at}ffn.fc1", ln(w, f"{at}final_layer_norm", h)))
    return h + lin(w, f"{at}ffn.fc2", ln(w, f"{at}ffn.ffn_layernorm", wide))


def mha(
    w: dict[str, Tensor], at: str, name: str, o: dict[str, Any], q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """METHOD 3.6 with its own projections around it."""
    if o["with_cffn"]:
        q = lin(w, f"{at}q_proj", q)
        weights = [w[f"{at}{name}.{c}_proj_weight"] for c in "qkv"]
    else:
        d = o["embed_dim"]
        packed = w[f"{at}{name}.in_proj_weight"]
        weights = [packed[:d], packed[d : 2 * d], packed[2 * d :]]
    e = weights[0].shape[0]
    bias = w[f"{at}{name}.in_proj_bias"]
    q, k, v = (
        x @ m.T + bias[j * e : (j + 1) * e]
        for j, (x, m) in enumerate(zip((q, k, v), weights, strict=True))
    )
    size = e // o["num_heads"]
    heads = []
    for h in range(o["num_heads"]):
        at_h = slice(h * size, (h + 1) * size)
        heads.append(torch.softmax(q[:, at_h] @ k[:, at_h].T / math.sqrt(size), 1) @ v[:, at_h])
    out = lin(w, f"{at}{name}.out_proj", torch.cat(heads, 1))
    return lin(w, f"{at}output_proj", out) if o["with_cffn"] else out


def extract(w: dict[str, Tensor], at: str, c: Tensor, pe: Tensor, x: Tensor, o: Any) -> Tensor:
    kv = ln(w, f"{at}attn.norm_kq", x)
    c = 2 * c + mha(w, f"{at}attn.", "multihead_attn", o, ln(w, f"{at}attn.norm", c) + pe, kv, kv)
    if not o["with_cffn"]:
        return c
    return c + lin(
        w, f"{at}ffn.linear2", torch.relu(lin(w, f"{at}ffn.linear1", ln(w, f"{at}ffn.norm", c)))
    )


def gene_tokens(w: dict[str, Tensor], o: dict[str, Any], genes: Tensor) -> Tensor:
    rows = []
    for i, g in enumerate(genes.split(SIZES)):
        at = f"gene_encoder.gene_networks.{i}."
        rows.append(F.elu(lin(w, f"{at}1.0", F.elu(lin(w, f"{at}0.0", g)))))
    x = torch.stack(rows)
    depth = o["gene"]["depth"]
    for i in range(depth):
        at = f"gene_encoder.mlp_mixer.{i}."
        x = x + lin(w, f"{at}0.fn.3", gelu(lin(w, f"{at}0.fn.0", ln(w, f"{at}0.norm", x).T))).T
        x = x + lin(w, f"{at}1.fn.3", gelu(lin(w, f"{at}1.fn.0", ln(w, f"{at}1.norm", x))))
    x = lin(w, f"gene_encoder.mlp_mixer.{depth + 1}", ln(w, f"gene_encoder.mlp_mixer.{depth}", x))
    return lin(w, "gene_encoder.pathway_compression", x.T).T


def place(coord: Tensor, o: dict[str, Any]) -> Tensor:
    """METHOD 3.1: second coordinate first, and the wrap of the index."""
    quarter = o["embed_dim"] // 4
    index = math.floor(coord[0] / 256) * o["slide_ngrids"] + math.floor(coord[1] / 256)
    i, j = divmod(index, o["slide_ngrids"])
    w = [10000.0 ** (-k / quarter) for k in range(quarter)]
    row = [f(p * x) for p in (j, i) for f in (math.sin, math.cos) for x in w]
    return torch.tensor(row, dtype=torch.float64)


def oracle(w: dict[str, Tensor], o: dict[str, Any], case: dict[str, Tensor], task: int) -> Tensor:
    """The embedding `[out]` of one case and task; what is missing is not in `case`."""
    named: list[tuple[str, Tensor]] = []
    if "clinical" in case:
        hidden = torch.relu(lin(w, "clinical_mlp.0", case["clinical"]))
        named.append(("clinical", ln(w, "clinical_mlp.3", lin(w, "clinical_mlp.2", hidden))))
    if o["multi_task"] > 1:
        onehot = F.one_hot(torch.tensor(task), o["multi_task"]).double()
        named.append(("task", ln(w, "task_weight.1", lin(w, "task_weight.0", onehot))))
    if "genes" in case:
        if o["prompt_agg"] == "cls":
            named.append(("cls", w["gene_cls"].flatten()))
        named += [("gene", row) for row in gene_tokens(w, o, case["genes"])]
    every = ["clinical"] * o["clinical"] + ["task"] * (o["multi_task"] > 1)
    every += ["cls"] * (o["prompt_agg"] == "cls") + ["gene"] * o["gene"]["final_groups"]
    names = [name for name, _ in named]
    pe = w["gene_pe"][[name in names for name in every]]
    c = torch.stack([row for _, row in named]) if named else torch.zeros(0, o["embed_dim"])
    hidden = "task" if o.get("task_trunk") == "shared" else None
    shown = [i for i, name in enumerate(names) if name != hidden]
    x = cls = None
    if "tiles" in case:
        where = torch.stack([place(p, o) for p in case["coords"]])
        x = lin(w, "patch_embed.proj", case["tiles"]) + where
        t = torch.cat([w["cls_token"][0], x])
        for i in range(o["interaction_indexes"][0][0]):
            t = layer(w, i, t, o)
        cls, x = t[:1], t[1:]
    for n, (first, last) in enumerate(o["interaction_indexes"]):
        if n > 0 and o["use_prompt_sa"] and len(c):
            at = f"prompt_selfattention.{n}."
            normed = ln(w, f"{at}norm", c)
            rows = []
            for i in range(len(c)):  # METHOD 8: a hidden token is seen by itself alone
                seen = sorted({*shown, i})
                keys = normed[seen] + pe[seen]
                query = (normed + pe)[i : i + 1]
                rows.append(mha(w, at, "self_attn", o, query, keys, normed[seen]))
            c = c + torch.cat(rows)
        if x is None:
            continue
        at = f"interactions.{n}."
        if shown:
            kv = ln(w, f"{at}injector.attn.norm_kq", c[shown]) + pe[shown]
            query = ln(w, f"{at}injector.attn.norm", x)
            seen = mha(w, f"{at}injector.attn.", "multihead_attn", o, query, kv, kv)
            x = x + w[f"{at}injector.gamma"] * (x + seen)
        t = torch.cat([cls, x])
        for i in range(first, last + 1):
            t = layer(w, i, t, o)
        cls, x = t[:1], t[1:]
        c = extract(w, f"{at}extractor.", c, pe, x, o)
        if n == len(o["interaction_indexes"]) - 1 and o["use_extra_extractor"]:
            for i in range(2):
                c = extract(w, f"{at}extra_extractors.{i}.", c, pe, x, o)
    zero = torch.zeros(o["embed_dim"], dtype=torch.float64)
    pick = "cls" if o["prompt_agg"] == "cls" else "gene"
    image = zero if x is None else (x.mean(0) if o["global_pool"] else cls[0])
    slots = [image]
    for slot, on in (("task", o["multi_task"] > 1), (pick, True), ("clinical", o["clinical"])):
        rows = [c[i] for i, name in enumerate(names) if name == slot]
        if on:
            slots.append(torch.stack(rows).mean(0) if rows else zero)
    f = torch.cat(slots) if o["token_agg"] == "cat" else torch.stack(slots).sum(0)
    return lin(w, "final_project", ln(w, "final_norm", f))

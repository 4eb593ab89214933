"""The golden runner on files of options that no shared file has, written by the literal oracle."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modaltune.golden import run_folder

FROZEN = ("cls_token", "patch_embed.", "encoder.", "norm.")
RECIPE: dict[str, Any] = {"lr": 1e-3, "weight_decay": 1e-2, "betas": [0.9, 0.999]}
VARIANTS: dict[str, dict[str, Any]] = {
    "widths": {
        "embed_dim": 24, "in_chans": 9, "longnet": {"heads": 6, "ffn_dim": 20}, "num_heads": 3,
        "output_dim": 11,
    },
    "ranges": {"depth": 6, "interaction_indexes": [[0, 0], [2, 3], [5, 5]], "multi_task": 2},
    "pool": {"global_pool": True, "multi_task": 1, "use_extra_extractor": False},
    "cat clinical": {"token_agg": "cat", "clinical": True, "clinfeat_dim": 7},
    "cls clinical": {"prompt_agg": "cls", "clinical": True, "multi_task": 4},
    "plain": {"with_cffn": False, "use_prompt_sa": False, "token_agg": "cat", "multi_task": 2},
    "segments": {"segment_length": [4, 8], "dilated_ratio": [1, 4], "longnet": {"heads": 2,
                 "ffn_dim": 12}},
}  # fmt: skip


def _load_oracle() -> Any:
    path = Path(__file__).with_name("oracle_model.py")
    spec = importlib.util.spec_from_file_location("oracle_model", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ref = _load_oracle()


def _draw(*shape: int) -> Tensor:
    """Values that float32 holds exactly, so that the stored file is what was computed from."""
    return torch.randn(*shape).double()


def _projector(text: Tensor, out: int) -> tuple[dict[str, Tensor], Tensor]:
    """METHOD 3.10: a frozen projector, and the unit rows it makes of the text rows."""
    weights = {
        "conv1.0.weight": _draw(out, text.shape[1], 1, 1),
        "conv1.0.bias": _draw(out),
        "conv1.1.weight": _draw(out, 1, 1),
        "conv1.1.bias": _draw(out, 1, 1),
        "conv1.3.weight": _draw(out, out, 1, 1),
        "conv1.3.bias": _draw(out),
    }
    flat = {name: t.flatten(1) if t.ndim == 4 else t.flatten() for name, t in weights.items()}
    hidden = torch.relu(ref.ln(flat, "conv1.1", ref.lin(flat, "conv1.0", text)))
    rows = ref.lin(flat, "conv1.3", hidden)
    return weights, rows / rows.norm(dim=1, keepdim=True)


def _run(w: dict[str, Tensor], o: Any, case: dict[str, Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of all tasks and the loss."""
    z = torch.stack([ref.oracle(w, o, case, k) for k in range(o["multi_task"])])
    p = torch.softmax(t, 1)
    return z, 10 * (p * (p.log() - torch.log_softmax(z / z.norm(dim=1, keepdim=True), 1))).sum()


def write_case(folder: Path, name: str) -> Path:
    """Write one golden case as the README of the golden files says."""
    torch.manual_seed(len(name))
    o = {**ref.BASE, **VARIANTS[name]}
    w = {n: v.float().double() for n, v in ref.random_state(o, seed=len(name)).items()}
    tuned = [n for n in w if not n.startswith(FROZEN)]
    for n in tuned:
        w[n].requires_grad_()
    case = {
        "tiles": _draw(29, o["in_chans"]),
        "coords": torch.randint(0, 256 * o["slide_ngrids"], (29, 2)),
        "genes": _draw(sum(ref.SIZES)),
    } | ({"clinical": _draw(o["clinfeat_dim"])} if o["clinical"] else {})
    text, rows = _draw(4, 8), [0, 1, 3, 2][: o["multi_task"]]
    projector, targets = _projector(text, o["output_dim"])
    z, loss = _run(w, o, case, targets[rows])
    loss.backward()
    grads = {n: w[n].grad for n in tuned if w[n].grad is not None}
    stepped = {n: v.detach().clone() for n, v in w.items()}
    for n, g in grads.items():  # AdamW's first step
        stepped[n] = stepped[n] * (1 - 1e-3 * 1e-2) - 1e-3 * g / (g.abs() + 1e-8)
    with torch.no_grad():
        z_after, loss_after = _run(stepped, o, case, targets[rows])
    stored = {f"weights/{n}": v.detach() for n, v in w.items()}
    stored |= {f"projector/{n}": v for n, v in projector.items()}
    stored |= {f"in/genes.{i}": g[None] for i, g in enumerate(case["genes"].split(ref.SIZES))}
    stored |= {"in/x": case["tiles"][None], "in/coords": case["coords"][None], "in/text": text}
    stored |= {"in/clinical": case["clinical"][None]} if o["clinical"] else {}
    stored |= {"out/logits": z.detach(), "out/loss": loss.detach().reshape(1)}
    stored |= {"out/text_projected_normalised": targets}
    stored |= {f"grad/{n}": g for n, g in grads.items()}
    stored |= {f"step/{n}": stepped[n] for n in tuned}
    stored |= {"out/logits_after_step": z_after, "out/loss_after_step": loss_after.reshape(1)}
    narrow = {
        n: (v.float() if v.is_floating_point() else v).contiguous() for n, v in stored.items()
    }
    path = folder / f"{name.replace(' ', '_')}.json"
    save_file(narrow, path.with_suffix(".safetensors"))
    zero = [n for n, g in grads.items() if float(g.abs().max()) < 1e-12]
    facts = {"kind": "full_model", "capture_task": 0, "train": True, "adam_eps": 1e-8, **RECIPE}
    facts |= {"label_rows": rows, "loss": {"temperature": 1.0, "factor": 10.0}}
    facts |= {
        "grad_analytically_zero": zero,
        "tensors": {n: list(v.shape) for n, v in narrow.items()},
    }
    path.write_text(json.dumps({**o, **facts}), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", VARIANTS)
def test_options_no_shared_file_has(tmp_path: Path, name: str) -> None:
    write_case(tmp_path, name)
    rows = run_folder(tmp_path)
    assert [(r.tensor, r.error, r.note) for r in rows if not r.is_ok] == []
    compared = {r.tensor for r in rows}
    assert {"out/logits", "out/loss", "out/logits_after_step", "grad/gene_pe"} <= compared


def test_a_wrong_option_is_a_miss(tmp_path: Path) -> None:
    path = write_case(tmp_path, "segments")
    meta = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**meta, "segment_length": [8, 8]}), encoding="utf-8")
    assert "out/logits" in {r.tensor for r in run_folder(tmp_path) if not r.is_ok}
    assert load_file(path.with_suffix(".safetensors"))["out/logits"].shape == (3, 7)

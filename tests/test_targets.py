"""Text projector and distillation loss: golden files, float64 oracle, published initialisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modaltune.errors import CheckpointError, InputError
from modaltune.targets import (
    TextProjector,
    distillation_loss,
    load_reference_projector,
    reference_projector_state,
)

GOLDEN = ["case6_projector_kl", "case6_projector_kl_512_256"]


def published_projector(text_dim: int, out_dim: int) -> nn.Sequential:
    """The form METHOD 3.10 states: 1x1 convolutions around a LayerNorm over channels."""
    return nn.Sequential(
        nn.Conv2d(text_dim, out_dim, 1),
        nn.LayerNorm([out_dim, 1, 1]),
        nn.ReLU(),
        nn.Conv2d(out_dim, out_dim, 1),
    )


def literal_loss(z: torch.Tensor, t_hat: torch.Tensor, tau: float, factor: float) -> torch.Tensor:
    """The formula of METHOD 3.10, term by term, for one case."""
    total = torch.zeros((), dtype=z.dtype)
    for output, target in zip(z, t_hat, strict=True):
        p = torch.exp(target / tau) / torch.exp(target / tau).sum()
        unit = output / output.pow(2).sum().sqrt()
        q = torch.exp(unit / tau) / torch.exp(unit / tau).sum()
        total = total + (p * (p.log() - q.log())).sum()
    return factor * tau**2 * total


@pytest.mark.shared
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_projection_loss_and_gradient(shared_dir: Path, name: str) -> None:
    tensors = load_file(shared_dir / "golden" / f"{name}.safetensors")
    options = json.loads((shared_dir / "golden" / f"{name}.json").read_text())
    projector = load_reference_projector(tensors)
    text = tensors["in/text"]
    torch.testing.assert_close(projector(text), tensors["mid/text_projected"], atol=2e-6, rtol=1e-5)
    t_hat = projector.project(text)
    torch.testing.assert_close(t_hat, tensors["mid/text_normalised"], atol=1e-6, rtol=1e-5)

    targets = t_hat[options["label_rows"]].unsqueeze(0)
    z = tensors["in/logits"].unsqueeze(0).requires_grad_()
    compared = 0
    for key in (key for key in tensors if key.startswith("out/loss")):
        tau = float(key.partition("_T")[2] or options["temperature"])
        loss = distillation_loss(z, targets, temperature=tau, factor=options["factor"])
        assert loss.shape == (1,)
        assert abs(loss.item() - tensors[key].item()) < 2e-5
        compared += 1
    assert compared == 3
    (grad,) = torch.autograd.grad(distillation_loss(z, targets).sum(), z)
    expected = tensors["grad/logits"]
    assert (grad[0] - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("tau", [0.07, 0.5, 1.0, 2.0])
def test_loss_and_gradient_equal_the_literal_formula(tau: float) -> None:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(4, 3, 33, generator=generator, dtype=torch.float64).requires_grad_()
    t_hat = nn.functional.normalize(torch.randn(4, 3, 33, generator=generator).double(), dim=-1)
    loss = distillation_loss(z, t_hat, temperature=tau, factor=7.0)
    literal = torch.stack([literal_loss(z[b], t_hat[b], tau, 7.0) for b in range(4)])
    torch.testing.assert_close(loss, literal, rtol=1e-10, atol=1e-12)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    ours = torch.autograd.grad((loss * weights).sum(), z, retain_graph=True)[0]
    theirs = torch.autograd.grad((literal * weights).sum(), z)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_loss_keeps_cases_apart_and_ignores_output_length() -> None:
    z, t_hat = torch.randn(3, 2, 16), nn.functional.normalize(torch.randn(3, 2, 16), dim=-1)
    batch = distillation_loss(z, t_hat)
    assert batch.dtype == torch.float32
    single = torch.cat([distillation_loss(z[b : b + 1], t_hat[b : b + 1]) for b in range(3)])
    torch.testing.assert_close(batch, single, rtol=0, atol=0)
    torch.testing.assert_close(distillation_loss(3.7 * z, t_hat), batch)
    assert distillation_loss(2 * t_hat, t_hat).abs().max() < 1e-7


def test_half_precision_outputs_lose_nothing_more_than_their_own_rounding() -> None:
    z, t_hat = torch.randn(2, 3, 256), nn.functional.normalize(torch.randn(2, 3, 256), dim=-1)
    half = z.half()
    assert distillation_loss(half, t_hat).dtype == torch.float32
    torch.testing.assert_close(
        distillation_loss(half, t_hat), distillation_loss(half.float(), t_hat)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = distillation_loss(z, t_hat)
    torch.testing.assert_close(inside, distillation_loss(z, t_hat), rtol=0, atol=0)


def test_same_seed_gives_the_weights_of_the_published_form() -> None:
    torch.manual_seed(11)
    published = published_projector(48, 24)
    state_before = torch.get_rng_state()
    ours = TextProjector(48, 24, seed=11)
    assert torch.equal(torch.get_rng_state(), state_before)
    tensors = {f"projector/conv1.{key}": value for key, value in published.state_dict().items()}
    for key, value in load_reference_projector(tensors).state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=0, atol=0)
    text = torch.randn(5, 48)
    images = published(text[:, :, None, None])[:, :, 0, 0]
    torch.testing.assert_close(ours(text), images, rtol=1e-5, atol=1e-6)


def test_projector_is_frozen_saved_and_gives_unit_rows() -> None:
    projector = TextProjector(10, 6, seed=1)
    assert not any(p.requires_grad for p in projector.parameters())
    names = {f"{m}.{p}" for m in ("in_proj", "norm", "out_proj") for p in ("weight", "bias")}
    assert set(projector.state_dict()) == names
    rows = projector.project(torch.randn(2, 4, 10, dtype=torch.float64))
    assert rows.shape == (2, 4, 6)
    torch.testing.assert_close(rows.norm(dim=-1), torch.ones(2, 4))
    torch.manual_seed(5)
    drawn = TextProjector(10, 6)
    assert not torch.equal(drawn.in_proj.weight, TextProjector(10, 6).in_proj.weight)


def test_reference_names_and_shapes_round_trip() -> None:
    projector = TextProjector(10, 6, seed=2)
    state = reference_projector_state(projector)
    published = published_projector(10, 6)
    published.load_state_dict({k.removeprefix("projector/conv1."): v for k, v in state.items()})
    back = load_reference_projector(state)
    for key, value in projector.state_dict().items():
        assert torch.equal(back.state_dict()[key], value)


def test_errors_name_what_is_wrong() -> None:
    projector = TextProjector(10, 6, seed=2)
    with pytest.raises(InputError, match=r"text must have 10 columns.*\(4, 384\)"):
        projector.project(torch.zeros(4, 384))
    with pytest.raises(InputError, match="must be positive, got 0 and 6"):
        TextProjector(0, 6)
    with pytest.raises(InputError, match=r"\[cases, tasks, width\].*\(1, 3, 6\) and \(1, 4, 6\)"):
        distillation_loss(torch.zeros(1, 3, 6), torch.zeros(1, 4, 6))
    with pytest.raises(InputError, match="temperature must be > 0, got 0"):
        distillation_loss(torch.zeros(1, 3, 6), torch.zeros(1, 3, 6), temperature=0)
    state = reference_projector_state(projector)
    del state["projector/conv1.3.bias"]
    with pytest.raises(CheckpointError, match=r"got no projector/conv1\.3\.bias"):
        load_reference_projector(state)
    state = {**reference_projector_state(projector), "projector/conv1.1.bias": torch.zeros(7, 1, 1)}
    with pytest.raises(CheckpointError, match=r"conv1\.1\.bias must have shape \(6, 1, 1\)"):
        load_reference_projector(state)
    state = {**reference_projector_state(projector), "projector/conv1.0.weight": torch.zeros(6, 10)}
    with pytest.raises(CheckpointError, match=r"must be \[out, in, 1, 1\]"):
        load_reference_projector(state)

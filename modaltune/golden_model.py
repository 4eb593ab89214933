"""The whole model of a golden case: outputs, intermediates, loss, gradients and one AdamW step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modaltune import reference_import as ref
from modaltune.batch import CaseBatch
from modaltune.golden_cases import Answers, Inputs
from modaltune.learner import ModalTuneLearner
from modaltune.model import ModalTune
from modaltune.reference_config import config_from_reference
from modaltune.targets import Targets, load_reference_projector
from modaltune.train import TrainConfig, fit


def full_model(inputs: Inputs, meta: Mapping[str, Any], impl: str) -> Answers:
    """Recompute a case of kind `full_model`, through the training loop's own steps."""
    model, batch = _model(inputs, meta, impl)
    targets = (
        load_reference_projector(inputs.group("projector/"), prefix="")
        .to(inputs.device)
        .project(inputs["in/text"])
    )
    recipe = TrainConfig(
        epochs=1,
        warmup_epochs=0,
        lr=meta["lr"],
        weight_decay=meta["weight_decay"],
        betas=tuple(meta["betas"]),
        eps=meta["adam_eps"],
        temperature=meta["loss"]["temperature"],
        loss_factor=meta["loss"]["factor"],
    )
    answers: Answers = {"out/text_projected_normalised": targets}
    answers.update(_intermediates(model, batch, meta["capture_task"]))
    rows = targets[list(meta["label_rows"])][None]
    learner = ModalTuneLearner(model, recipe)

    def evaluated() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            outputs = model(batch)
            return outputs[0], learner.loss(outputs, rows).reshape(1)

    if not meta.get("train"):
        logits, loss = evaluated()
        return {**answers, "out/logits": logits, "out/loss": loss}

    (log,) = fit(learner, _OneCase(batch, rows), recipe)
    if learner.outputs is not None:
        answers["out/logits"] = learner.outputs[0]
    answers["out/loss"] = rows.new_tensor([log.loss])
    rules = ref.model_rules(model)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    answers.update({f"grad/{k}": g for k, g in ref.to_published(rules, grads).items()})
    stepped = dict(model.named_parameters())
    answers.update({f"step/{k}": p for k, p in ref.to_published(rules, stepped).items()})
    answers["out/logits_after_step"], answers["out/loss_after_step"] = evaluated()
    return answers


class _WithoutDropout(ModalTune):
    """The model of the golden steps, which were taken in evaluation mode."""

    def train(self, mode: bool = True) -> _WithoutDropout:
        super().train(False)
        return self


class _OneCase:
    """A golden case as the training loop reads cases."""

    def __init__(self, batch: CaseBatch, rows: Tensor) -> None:
        self._batch, self._targets = batch, Targets.of_text(rows)

    def __len__(self) -> int:
        return 1

    def for_epoch(self, epoch: int) -> _OneCase:
        """See `modaltune.learner.TrainingCases`."""
        return self

    def batch(self, indices: Sequence[int]) -> CaseBatch:
        return self._batch

    def targets(self, indices: Sequence[int]) -> Targets:
        return self._targets


def _model(inputs: Inputs, meta: Mapping[str, Any], impl: str) -> tuple[ModalTune, CaseBatch]:
    genes, sizes = inputs.genes()
    model = _WithoutDropout(
        config_from_reference(meta),
        gene_index=torch.arange(genes.shape[1]),
        gene_offsets=torch.tensor([0, *sizes]).cumsum(0),
    )
    model.to(inputs.device, inputs.dtype).eval()
    ref.model_from_reference(model, inputs.group("weights/"), meta["name"])
    model.set_impl(impl)
    modalities = {"genes": genes}
    if meta.get("clinical"):
        modalities["clinical"] = inputs["in/clinical"]
    tiles = inputs["in/x"][0]
    bounds = torch.tensor([0, tiles.shape[0]])
    return model, CaseBatch(tiles, inputs["in/coords"][0], bounds, modalities)


@torch.no_grad()
def _intermediates(model: ModalTune, batch: CaseBatch, task: int) -> Answers:
    """Run one task and return what the modules saw and made, under the stored names."""
    seen: Answers = {}
    handles = []

    def after(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[f"mid/{name}"] = output.clone()

        handles.append(module.register_forward_hook(hook))

    def tokens_after(name: str, module: nn.Module, skip: int) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[f"mid/{name}"] = output.x[skip:][None].clone()

        handles.append(module.register_forward_hook(hook))

    def block_hooks(n: int, block: nn.Module) -> None:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[f"mid/prompt_sa.{n}"] = args[2].clone()

        def done(_: nn.Module, __: Any, output: tuple[Any, Tensor]) -> None:
            tokens, modal = output
            seen[f"mid/interaction.{n}.cls"] = tokens.x[:1][None].clone()
            seen[f"mid/interaction.{n}.x"] = tokens.x[1:][None].clone()
            seen[f"mid/interaction.{n}.c"] = modal.clone()

        handles.extend([block.register_forward_pre_hook(before), block.register_forward_hook(done)])

    encoder: Any = model.slide_encoder
    for i, layer in enumerate(encoder.layers):
        tokens_after(f"longnet.{i}", layer, 0)
    for n, block in enumerate(model.adapter.interactions()):
        block_hooks(n, block)
        tokens_after(f"interaction.{n}.injector", block.injector, 1)
        after(f"interaction.{n}.extractor", block.extractor)
    genes: Any = model.modalities["genes"]
    after("gene_encoder", genes.encoder)
    if "clinical" in model.modalities:
        after("clinical_token", model.modalities["clinical"])
    if model.task_prompts is not None:
        after("task_token", model.task_prompts)

    def head_input(_: nn.Module, args: tuple[Any, ...]) -> None:
        seen["mid/final_norm_in"] = args[0].clone()

    handles.append(model.head_norm.register_forward_pre_hook(head_input))
    after("final_norm", model.head_norm)
    model(batch, [task])
    for handle in handles:
        handle.remove()
    seen["mid/patch_embed"] = encoder.patch_embed(batch.tiles)[None]
    seen["mid/tokens_in"] = encoder.embed(batch.tiles, batch.positions_px, batch.offsets).x[None]
    return seen

"""ModalTune: a frozen slide encoder, tuned through a Modal Adapter by genes, clinic and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from modaltune.adapter import ModalAdapter
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.modalities import ClinicalModality, GeneModality, Modality, TaskPrompts
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.slide_encoders.protocol import SlideEncoder, SlideTokens
from modaltune.slide_encoders.titan import TitanEncoder

TASK = "task"
_RESERVED = {"slide", TASK, "genes", "clinical"}  # names of our own slots in the head


def build_slide_encoder(config: ModalTuneConfig) -> SlideEncoder:
    """Return the slide encoder of a configuration, with random weights."""
    if isinstance(config.slide_encoder, LongNetConfig):
        return LongNet(config.slide_encoder)
    return TitanEncoder(config.slide_encoder)


def set_impl(module: nn.Module, impl: str) -> None:
    """Choose the implementation of every kernel below `module`."""
    for child in module.modules():
        if isinstance(getattr(child, "impl", None), str):
            setattr(child, "impl", impl)  # noqa: B010  (nn.Module types attributes as modules)


@dataclass(frozen=True)
class _Encoded:
    """Tokens of one modality and which cases have it."""

    tokens: Tensor  # [B, n, D]
    present: Tensor  # [B] bool


class ModalTune(nn.Module):
    """Patient embeddings from tiles, genes, clinical records and task prompts.

    Order of the modal tokens: clinical, task, genes (cls first), further modalities. Their learned
    positions are one table `modal_positions` `[G, D]`.

    Args:
        config: Shape of everything.
        gene_index: `[nnz]` int64 genes of all pathways (`PathwayIndex.indices`); None without.
        gene_offsets: `[P + 1]` int64 first membership of each pathway.
        slide_encoder: A ready encoder; built with random weights from `config` unless given.
        extra_modalities: Further modalities by name.

    Source: Ramanathan et al., ICCV 2025.
    """

    def __init__(
        self,
        config: ModalTuneConfig,
        *,
        gene_index: Tensor | None = None,
        gene_offsets: Tensor | None = None,
        slide_encoder: SlideEncoder | None = None,
        extra_modalities: Mapping[str, Modality] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.slide_encoder = slide_encoder or build_slide_encoder(config)
        self.slide_encoder.requires_grad_(False)
        width = self.slide_encoder.width
        modalities: dict[str, Modality] = {}
        if config.clinical_features:
            modalities["clinical"] = ClinicalModality(config.clinical_features, width)
        if config.genes is not None:
            if gene_index is None or gene_offsets is None:
                raise InputError(
                    "gene_index and gene_offsets must be given for a model with genes, got None; "
                    "build them with PathwayIndex, or set genes=None in the configuration"
                )
            modalities["genes"] = GeneModality(
                gene_index, gene_offsets, width, config.genes, config.prompt_agg == "cls"
            )
        taken = _RESERVED & set(extra_modalities or {})
        if taken:
            raise InputError(
                f"extra_modalities must have names other than {sorted(_RESERVED)}, got "
                f"{sorted(taken)}; rename them"
            )
        modalities.update(extra_modalities or {})
        self.modalities = nn.ModuleDict(modalities)
        self.task_prompts = TaskPrompts(len(config.tasks), width) if self.has_tasks else None
        self.adapter = ModalAdapter(width, self.slide_encoder.depth, config.adapter)
        self.spans = self._token_spans(modalities)
        total = max((span.stop for span in self.spans.values()), default=0)
        self.modal_positions = nn.Parameter(torch.empty(total, width))
        nn.init.trunc_normal_(self.modal_positions, std=0.02)
        slots = 1 + len(self.spans) if config.token_agg == "cat" else 1
        self.head_norm = nn.LayerNorm(width * slots)
        self.head_project = nn.Linear(width * slots, config.out_features)
        nn.init.trunc_normal_(self.head_project.weight, std=0.02)
        nn.init.zeros_(self.head_project.bias)

    @property
    def has_tasks(self) -> bool:
        """Whether there is a task prompt (more than one task)."""
        return len(self.config.tasks) > 1

    def _token_spans(self, modalities: Mapping[str, Modality]) -> dict[str, slice]:
        """Return where each modality's tokens stand among the modal tokens."""
        order = [name for name in ("clinical",) if name in modalities]
        order += [TASK] if self.has_tasks else []
        order += [name for name in modalities if name != "clinical"]
        spans, at = {}, 0
        for name in order:
            count = 1 if name == TASK else modalities[name].num_tokens
            spans[name] = slice(at, at + count)
            at += count
        return spans

    def each_modality(self) -> dict[str, Modality]:
        """Return the modality encoders by name."""
        return {name: m for name, m in self.modalities.items() if isinstance(m, Modality)}

    def set_impl(self, impl: str) -> None:
        """Choose the implementation of every kernel: auto, triton, cpu or reference."""
        set_impl(self, impl)

    def train(self, mode: bool = True) -> ModalTune:
        """Set training mode; the frozen trunk follows only under `trunk_dropout`."""
        super().train(mode)
        self.slide_encoder.train(mode and self.config.trunk_dropout)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is tuned."""
        return [p for p in self.parameters() if p.requires_grad]

    def encode_modalities(self, batch: CaseBatch) -> dict[str, _Encoded]:
        """Turn the values of every modality into tokens; absent values become masked tokens."""
        encoded = {}
        for name, module in self.each_modality().items():
            values, present = batch.modality(name)
            if values is None:
                tokens = self.modal_positions.new_zeros(
                    (batch.num_cases, module.num_tokens, self.slide_encoder.width)
                )
            else:
                tokens = module(values.to(self.modal_positions.dtype))
            encoded[name] = _Encoded(tokens, present.to(tokens.device))
        return encoded

    def embed_tiles(self, batch: CaseBatch) -> tuple[SlideTokens | None, Tensor | None]:
        """Embed the tiles and run the blocks before the first injector, shared by all tasks.

        Returns:
            Tokens of the cases that have tiles (None if there are none), and the indices of those
            cases (None when all have tiles).
        """
        counts = batch.offsets.diff()
        if not bool(counts.any()):
            return None, None
        filled = counts > 0
        bounds = torch.cat([batch.offsets[:1], batch.offsets[1:][filled]])
        try:
            tokens = self.slide_encoder.embed(batch.tiles, batch.positions_px, bounds)
        except InputError:
            self._name_misplaced(batch)
            raise
        if self.adapter.first_block > 0:
            tokens = self.slide_encoder.blocks(tokens, 0, self.adapter.first_block - 1)
        index = None if bool(filled.all()) else filled.nonzero().squeeze(1).to(tokens.x.device)
        return tokens, index

    def _name_misplaced(self, batch: CaseBatch) -> None:
        """Raise again what embedding the tiles raised, naming the first case that it is about."""
        bounds = batch.offsets.tolist()
        for case, (start, end) in enumerate(pairwise(bounds)):
            try:
                if end > start:
                    self.slide_encoder.embed(
                        batch.tiles[start:end],
                        batch.positions_px[start:end],
                        torch.tensor([0, end - start]),
                    )
            except InputError as error:
                raise InputError(f"case {batch.case_id(case)}: {error}") from error

    def _wanted_tasks(self, tasks: Sequence[int] | None) -> Sequence[int]:
        count = len(self.config.tasks)
        wanted = range(count) if tasks is None else tasks
        if not wanted or any(not 0 <= task < count for task in wanted):
            raise InputError(
                f"tasks must be indices in 0..{count - 1} of {', '.join(self.config.tasks)}, got "
                f"{list(wanted)}; leave them out for all"
            )
        return wanted

    def forward(self, batch: CaseBatch, tasks: Sequence[int] | None = None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]`, one per case and task asked for.

        Args:
            batch: Packed tiles and the modalities of B cases; any of them may be missing.
            tasks: Indices of the task prompts to run; all unless given.

        Raises:
            InputError: The batch does not fit the model, a tile lies outside the encoder's grid
                (the message names the case), or a task does not exist.
        """
        batch.check(self)
        wanted = self._wanted_tasks(tasks)
        parity = self.training and self.config.task_dropout == "parity"
        embedded = None if parity else self.embed_tiles(batch)
        encoded = None if parity else self.encode_modalities(batch)
        outputs = []
        for task in wanted:
            tokens, with_tiles = embedded or self.embed_tiles(batch)
            outputs.append(
                self._run_task(
                    task, tokens, with_tiles, encoded or self.encode_modalities(batch), batch
                )
            )
        return torch.stack(outputs, dim=1)

    def _run_task(
        self,
        task: int,
        tokens: SlideTokens | None,
        with_tiles: Tensor | None,
        encoded: Mapping[str, _Encoded],
        batch: CaseBatch,
    ) -> Tensor:
        cases = batch.num_cases
        parts, seen = [], []
        for name, span in self.spans.items():
            if name == TASK and self.task_prompts is not None:
                part = self.task_prompts(task).expand(cases, 1, -1)
                present = torch.ones(cases, dtype=torch.bool, device=part.device)
            else:
                part, present = encoded[name].tokens, encoded[name].present
            parts.append(part)
            seen.append(present.unsqueeze(1).expand(-1, span.stop - span.start))
        width = self.slide_encoder.width
        modal = (
            torch.cat(parts, dim=1) if parts else self.modal_positions.new_zeros(cases, 0, width)
        )
        mask = torch.cat(seen, dim=1) if seen else None
        if mask is None or bool(mask.all()):
            mask = None
        tokens, modal = self.adapter(
            self.slide_encoder,
            tokens,
            modal,
            self.modal_positions,
            key_mask=mask,
            self_mask=None if mask is None else mask.unsqueeze(1).expand(-1, mask.shape[1], -1),
            with_tiles=with_tiles,
        )
        return self._head(tokens, with_tiles, modal, mask)

    def _slide_slot(
        self, tokens: SlideTokens | None, with_tiles: Tensor | None, cases: int
    ) -> Tensor:
        """Return the image slot `[B, D]`; zero for cases without tiles."""
        zeros = self.modal_positions.new_zeros(cases, self.slide_encoder.width)
        if tokens is None:
            return zeros
        if self.config.global_pool:
            bounds = tokens.offsets.tolist()
            pooled = torch.stack(
                [tokens.x[a + tokens.num_prefix : b].mean(0) for a, b in pairwise(bounds)]
            )
        else:
            pooled = self.slide_encoder.pool(tokens)
        return pooled if with_tiles is None else zeros.index_copy(0, with_tiles, pooled)

    def _head(
        self,
        tokens: SlideTokens | None,
        with_tiles: Tensor | None,
        modal: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        slots = {"slide": self._slide_slot(tokens, with_tiles, modal.shape[0])}
        encoders = self.each_modality()
        for name, span in self.spans.items():
            own = modal[:, span]
            slot = own[:, 0] if name == TASK else encoders[name].summarise(own)
            if mask is not None:
                slot = torch.where(mask[:, span][:, :1], slot, torch.zeros_like(slot))
            slots[name] = slot
        order = ["slide", *(n for n in (TASK, "genes", "clinical") if n in slots)]
        order += [name for name in slots if name not in order]
        if self.config.token_agg == "cat":
            joined = torch.cat([slots[name] for name in order], dim=1)
        else:
            joined = torch.stack([slots[name] for name in order]).sum(0)
        return self.head_project(self.head_norm(joined))

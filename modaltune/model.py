"""ModalTune: a frozen slide encoder, tuned through a Modal Adapter by genes, clinic and tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from modaltune.adapter import ModalAdapter
from modaltune.batch import CaseBatch
from modaltune.config import ModalTuneConfig
from modaltune.errors import InputError
from modaltune.kernels.ranges import stage_range
from modaltune.modal_stream import TASK, Encoded, Encodings, GradientCut, ModalTokens, assemble
from modaltune.modalities import ClinicalModality, GeneModality, Modality, TaskPrompts
from modaltune.slide_encoders.longnet import LongNet, LongNetConfig
from modaltune.slide_encoders.protocol import SlideEncoder, SlideTokens
from modaltune.slide_encoders.titan import TitanEncoder

# Rows of all task prompts up to which separate passes run packed as one, without gradients. On a
# CPU the encoder says.
PACKED_ROWS_GPU = 32768
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

    def adjust(self, **settings: Any) -> None:
        """Change settings that leave the weights as they are, such as `task_trunk`.

        Raises:
            InputError: See `ModalTuneConfig.adjusted`.
        """
        self.config = self.config.adjusted(**settings)
        self.train(self.training)

    def train(self, mode: bool = True) -> ModalTune:
        """Set training mode; the frozen trunk follows only under `trunk_dropout`."""
        super().train(mode)
        self.slide_encoder.train(mode and self.config.trunk_dropout)
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return every parameter that is tuned."""
        return [p for p in self.parameters() if p.requires_grad]

    def encode_modalities(self, batch: CaseBatch) -> dict[str, Encoded]:
        """Turn the values of every modality into tokens; absent values become masked tokens."""
        encoded = {}
        for name, module in self.each_modality().items():
            values, present = batch.modality(name)
            if values is None:
                tokens = self.modal_positions.new_zeros(
                    (batch.num_cases, module.num_tokens, self.slide_encoder.width)
                )
            else:
                with stage_range(f"modality.{name}"):
                    tokens = module(values.to(self.modal_positions.dtype))
            encoded[name] = Encoded(tokens, present.to(tokens.device))
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
                        torch.tensor([0, end - start], device="cpu"),
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

    def encode(self, batch: CaseBatch, kept: Encodings | None = None) -> Encodings:
        """Embed the tiles and encode the modalities of a batch.

        Args:
            batch: B cases.
            kept: Encodings of the same batch, made for an earlier pass. What dropout does not
                touch, or touches once for all tasks (`task_dropout="shared"`), is taken from them.
        """
        parity = self.config.task_dropout == "parity"
        if kept is None or (parity and self.slide_encoder.training):
            tiles, with_tiles = self.embed_tiles(batch)
        else:
            tiles, with_tiles = kept.tiles, kept.with_tiles
        if kept is None or (parity and self.training):
            modalities: Mapping[str, Encoded] = self.encode_modalities(batch)
        else:
            modalities = kept.modalities
        return Encodings(batch.num_cases, tiles, with_tiles, modalities)

    def _passes(self, wanted: Sequence[int], rows: int) -> list[Sequence[int]]:
        """Return the tasks of each pass of the trunk."""
        if self.config.task_trunk == "shared":
            return [wanted]
        if self.training or torch.is_grad_enabled():
            return [[task] for task in wanted]  # dropout of each its own, activations of one alive
        return [wanted] if self.is_packed(rows, len(wanted)) else [[task] for task in wanted]

    def is_packed(self, rows: int, passes: int) -> bool:
        """Return whether separate passes over `rows` tiles run as one without gradients."""
        if self.config.task_packing != "auto":
            return self.config.task_packing == "always"
        is_gpu = self.modal_positions.is_cuda
        most = PACKED_ROWS_GPU if is_gpu else self.slide_encoder.packed_rows_cpu
        return rows * passes <= most

    def forward(self, batch: CaseBatch, tasks: Sequence[int] | None = None) -> Tensor:
        """Return raw embeddings `[B, T, out_features]`, one per case and task asked for.

        Args:
            batch: Packed tiles and the modalities of B cases; any of them may be missing.
            tasks: Indices of the task prompts to run; all unless given.

        Raises:
            InputError: The batch does not fit the model, a tile lies outside the encoder's grid
                (the message names the case), or a task does not exist.
        """
        return torch.cat([outputs for _, outputs in self.each_pass(batch, tasks)], dim=1)

    def each_pass(
        self, batch: CaseBatch, tasks: Sequence[int] | None = None, *, backward: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """Run the trunk pass after pass: once for every task, or once for all on a shared trunk.

        Args:
            batch: Packed tiles and the modalities of B cases.
            tasks: Indices of the task prompts to run; all unless given.
            backward: Every pass gets a graph of its own: pull back a loss of its outputs before
                asking for the next, and never hold two. The gradient of modality tokens that
                several passes share is collected, and pulled through their encoders once, after
                the last of these passes; so exhaust the iterator.

        Yields:
            The tasks of a pass as a slice of those asked for, and their embeddings
            `[B, t, out_features]`.

        Raises:
            InputError: As `forward`.
        """
        batch.check(self)
        wanted = self._wanted_tasks(tasks)
        encodings: Encodings | None = None
        cut: GradientCut | None = None
        injected: Tensor | None = None
        done = 0
        for group in self._passes(wanted, batch.tiles.shape[0]):
            encodings = self.encode(batch, encodings)
            if done == 0:
                injected = self._inject_first(wanted, encodings)
            given = encodings
            if backward:
                if cut is None or cut.whole is not encodings.modalities:
                    if cut is not None:
                        cut.pull()
                    cut = GradientCut(encodings)
                given = cut.applied(encodings)
            columns = slice(done, done + len(group))
            rows = None if injected is None else injected[columns].flatten(0, 1)
            yield columns, self._run_pass(group, given, rows)
            done = columns.stop
        if cut is not None:
            cut.pull()

    def _inject_first(self, tasks: Sequence[int], encodings: Encodings) -> Tensor | None:
        """Return the rows of every task after the first injector, `[T, M, D]`, or None.

        Up to there separate passes share everything but the key of their own task. None where that
        is no use: one task, a shared trunk, no tiles, or gradients, which one pass at a time needs.
        """
        separate = self.config.task_trunk == "separate" and self.task_prompts is not None
        if not separate or self.training or torch.is_grad_enabled():
            return None
        tiles, kept = encodings.tiles, encodings.with_tiles
        if tiles is None or len(tasks) == 1 or self.task_prompts is None:
            return None
        common = {name: span for name, span in self.spans.items() if name != TASK}
        modal = assemble(encodings, None, common, self.modal_positions, hide_prompts=False)
        tokens, mask = modal.tokens, modal.key_mask
        if kept is not None:
            tokens, mask = tokens[kept], None if mask is None else mask[kept]
        return self.adapter.interactions()[0].injector.for_tasks(
            tiles,
            tokens,
            modal.positions,
            self.task_prompts(tasks),
            self.modal_positions[self.spans[TASK].start],
            mask,
        )

    def _run_pass(
        self, tasks: Sequence[int], encodings: Encodings, injected: Tensor | None = None
    ) -> Tensor:
        """Run the trunk once for some tasks; return `[B, t, out_features]`.

        `injected` `[t * M, D]` are the rows of these tasks behind the first injector, if known.
        """
        shared = self.config.task_trunk == "shared"
        cases, copies = encodings.num_cases, 1 if shared else len(tasks)
        prompts = None if self.task_prompts is None else self.task_prompts(tasks)
        if prompts is not None and shared:
            prompts = prompts.expand(cases, -1, -1)
        elif prompts is not None:
            prompts = prompts.repeat_interleave(cases, dim=0).unsqueeze(1)
        encodings = encodings.repeated(copies, injected)
        modal = assemble(encodings, prompts, self.spans, self.modal_positions, hide_prompts=shared)
        tiles, tokens = self.adapter(
            self.slide_encoder,
            encodings.tiles,
            modal.tokens,
            modal.positions,
            key_mask=modal.key_mask,
            self_mask=modal.self_mask,
            with_tiles=encodings.with_tiles,
            recompute=self.config.recompute,
            injected=injected is not None,
        )
        slide = self._slide_slot(tiles, encodings.with_tiles, encodings.num_cases)
        out = self._head(slide, modal.with_tokens(tokens))  # [copies B, t or 1, out]
        out = out.unflatten(0, (copies, cases)).transpose(0, 1)
        return out.flatten(1, 2)  # [B, t, out]

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

    @stage_range("head")
    def _head(self, slide: Tensor, modal: ModalTokens) -> Tensor:
        """Return `[B, k, out_features]` of slide vectors `[B, D]` and a pass of k task tokens."""
        slots = {"slide": slide.unsqueeze(1)}
        encoders = self.each_modality()
        for name, span in modal.spans.items():
            own = modal.tokens[:, span]
            slot = own if name == TASK else encoders[name].summarise(own).unsqueeze(1)
            if modal.present is not None:
                seen = modal.present[:, span][:, :1, None]
                slot = torch.where(seen, slot, torch.zeros_like(slot))
            slots[name] = slot
        order = ["slide", *(n for n in (TASK, "genes", "clinical") if n in slots)]
        order += [name for name in slots if name not in order]
        prompts = max(slot.shape[1] for slot in slots.values())
        each = [slots[name].expand(-1, prompts, -1) for name in order]
        joined = (
            torch.cat(each, dim=2) if self.config.token_agg == "cat" else torch.stack(each).sum(0)
        )
        return self.head_project(self.head_norm(joined))

"""What meets the tiles in the trunk: encoded modalities, and the modal tokens of one pass.

A pass runs the trunk once. It serves one task prompt, all of them on a shared trunk (METHOD 8), or
several prompts as packed cases of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modaltune.slide_encoders.protocol import SlideTokens

TASK = "task"


@dataclass(frozen=True)
class Encoded:
    """Tokens of one modality and which cases have it."""

    tokens: Tensor  # [B, n, D]
    present: Tensor  # [B] bool

    def repeated(self, times: int) -> Encoded:
        """Return the same for `times` copies of all cases, copy after copy."""
        return Encoded(self.tokens.repeat(times, 1, 1), self.present.repeat(times))


@dataclass(frozen=True)
class Encodings:
    """What a pass over a batch starts from.

    Attributes:
        num_cases: B.
        tiles: Tokens of the cases that have tiles, before the first injector; None if none has.
        with_tiles: `[C]` indices of the cases in `tiles`, or None when all have tiles.
        modalities: Encoded modalities by name.
    """

    num_cases: int
    tiles: SlideTokens | None
    with_tiles: Tensor | None
    modalities: Mapping[str, Encoded]

    def repeated(self, times: int, rows: Tensor | None = None) -> Encodings:
        """Return the encodings of `times` copies of all cases, copy after copy.

        `rows` `[times * M, D]` stand for the rows of the copies, where they are not equal.
        """
        if times == 1 and rows is None:
            return self
        with_tiles = self.with_tiles
        if with_tiles is not None:
            copies = torch.arange(times, device=with_tiles.device) * self.num_cases
            with_tiles = (copies[:, None] + with_tiles).flatten()
        return Encodings(
            self.num_cases * times,
            None if self.tiles is None else repeat_cases(self.tiles, times, rows),
            with_tiles,
            {name: encoded.repeated(times) for name, encoded in self.modalities.items()},
        )


def repeat_cases(tokens: SlideTokens, times: int, rows: Tensor | None = None) -> SlideTokens:
    """Return `times` copies of packed cases, copy after copy; `rows` stand for their values."""
    count = int(tokens.offsets[-1])
    starts = torch.arange(times)[:, None] * count + tokens.offsets[:-1]
    return replace(
        tokens,
        x=tokens.x.repeat(times, 1) if rows is None else rows,
        offsets=torch.cat([starts.flatten(), torch.tensor([times * count])]),
        grid=None if tokens.grid is None else tokens.grid.repeat(times, 1),
    )


class GradientCut:
    """Encoded modalities as leaves of the graph, so that several backward passes may share them.

    Each pass adds to the gradient of the leaves; `pull` takes the sum through the encoders, once.
    """

    def __init__(self, encodings: Encodings) -> None:
        self.whole = encodings.modalities
        self.leaves = {
            name: replace(e, tokens=e.tokens.detach().requires_grad_(e.tokens.requires_grad))
            for name, e in self.whole.items()
        }

    def applied(self, encodings: Encodings) -> Encodings:
        """Return encodings whose modalities are the leaves."""
        return replace(encodings, modalities=self.leaves)

    def pull(self) -> None:
        """Take the gradients collected so far through the modality encoders."""
        pairs = [
            (encoded.tokens, grad)
            for name, encoded in self.whole.items()
            if (grad := self.leaves[name].tokens.grad) is not None
        ]
        if pairs:
            torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])


@dataclass(frozen=True)
class ModalTokens:
    """The modal tokens of one pass, and who may see whom.

    Attributes:
        tokens: `[B, G, D]`.
        positions: `[G, D]` learned positions; task tokens share one.
        spans: Where each modality's tokens stand.
        present: `[B, G]` bool, tokens that exist; None for all.
        key_mask: `[B, G]` bool, tokens that tiles may attend to; None for all.
        self_mask: `[B, G, G]` bool, which token may attend to which; None for all to all.
    """

    tokens: Tensor
    positions: Tensor
    spans: Mapping[str, slice]
    present: Tensor | None
    key_mask: Tensor | None
    self_mask: Tensor | None

    def with_tokens(self, tokens: Tensor) -> ModalTokens:
        """Return the same layout around other values `[B, G, D]`."""
        return replace(self, tokens=tokens)


def assemble(
    encodings: Encodings,
    prompts: Tensor | None,
    spans: Mapping[str, slice],
    positions: Tensor,
    *,
    hide_prompts: bool,
) -> ModalTokens:
    """Lay the modal tokens of a pass side by side.

    Args:
        encodings: Encoded modalities of B cases.
        prompts: `[B, K, D]` task tokens; None for a model without task prompts.
        spans: Order of the tokens with one task token, and the row of each in `positions`.
        positions: `[G, D]` learned positions of these.
        hide_prompts: No other token attends to a task token (a shared trunk).
    """
    device, cases = positions.device, encodings.num_cases
    parts, seen, rows, laid, at = [], [], [], {}, 0
    for name, span in spans.items():
        row = torch.arange(span.start, span.stop, device=device)
        if name == TASK and prompts is not None:
            part, present = prompts, torch.ones(cases, dtype=torch.bool, device=device)
            row = row.expand(prompts.shape[1])
        else:
            part, present = encodings.modalities[name].tokens, encodings.modalities[name].present
        laid[name] = slice(at, at + part.shape[1])
        at += part.shape[1]
        parts.append(part)
        rows.append(row)
        seen.append(present.unsqueeze(1).expand(-1, part.shape[1]))
    if not parts:
        empty = positions.new_zeros(cases, 0, positions.shape[1])
        return ModalTokens(empty, positions, {}, None, None, None)
    present = torch.cat(seen, dim=1)
    tokens, placed = torch.cat(parts, dim=1), positions[torch.cat(rows)]
    whole = bool(present.all())
    if hide_prompts and TASK in laid:
        is_task = torch.zeros(at, dtype=torch.bool, device=device)
        is_task[laid[TASK]] = True
        key_mask = present & ~is_task
        itself = torch.diag(is_task)
        self_mask: Tensor | None = key_mask.unsqueeze(1) | itself
        return ModalTokens(tokens, placed, laid, None if whole else present, key_mask, self_mask)
    if whole:
        return ModalTokens(tokens, placed, laid, None, None, None)
    self_mask = present.unsqueeze(1).expand(-1, at, -1)
    return ModalTokens(tokens, placed, laid, present, present, self_mask)

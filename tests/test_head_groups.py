"""How an extraction is cut into programs: parts of queries, groups of heads, blocks of rows."""

from __future__ import annotations

import torch

from modaltune.kernels.extraction._head_groups import head_plan, query_parts, work_list
from modaltune.testing import pack_offsets


def test_queries_fit_their_parts_and_no_part_is_empty() -> None:
    assert query_parts(65) == (64, 16)
    for queries in range(1, 129):
        main, tail = query_parts(queries)
        assert main in (16, 32, 64)
        assert tail in (0, 16, 32, 64)
        assert main + tail >= queries
        assert tail == 0 or main < queries
        assert main + tail < queries + 32 or queries < 17


def test_heads_stand_in_groups() -> None:
    published = head_plan(192, 12)
    assert (published.padded_dim, published.groups, published.columns) == (16, 3, 128)
    titan = head_plan(768, 8)
    assert (titan.padded_dim, titan.groups, titan.columns) == (128, 8, 256)
    assert head_plan(15, 5).padded_heads == 8


def test_work_covers_every_row_but_the_prefix_once() -> None:
    lengths = [0, 1, 2, 16, 17, 40]
    offsets = pack_offsets(lengths)
    work = work_list(offsets, 16, 2, torch.device("cpu"))
    rows = []
    for case, start, end in work.items.tolist():
        assert end == offsets[case + 1]
        rows += range(start, min(start + 16, end))
    assert sorted(rows + work.prefix.tolist()) == list(range(sum(lengths)))
    assert work.first[-1] == work.blocks == len(work.items)

"""A configuration as TOML in which every field says what it means."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from modaltune.run_config import RunConfig

_WIDTH = 96


def to_toml(config: RunConfig, *, explained: bool = True) -> str:
    """Write a configuration as TOML that `load_run_config` reads back to the same one.

    Args:
        config: What to write.
        explained: Each field under a comment with its meaning and default.
    """
    lines: list[str] = []
    _section(config, "", lines, explained)
    return "\n".join(lines).strip() + "\n"


def _section(config: BaseModel, prefix: str, lines: list[str], explained: bool) -> None:
    inner: list[tuple[str, BaseModel]] = []
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            inner.append((f"{prefix}{name}", value))
            continue
        if explained:
            default = field.get_default()
            said = (field.description or "").rstrip(".")
            meaning = f"{said} [default: {_value(default)}]"
            lines += textwrap.wrap(meaning, _WIDTH, initial_indent="# ", subsequent_indent="#   ")
        lines.append(f"{name} = {_value(value)}")
    for path, section in inner:
        lines.append("")
        if explained:
            first = (type(section).__doc__ or "").strip().split("\n")[0]
            lines.append(f"# {first}")
        lines.append(f"[{path}]")
        _section(section, f"{path}.", lines, explained)


def _value(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    raise TypeError(f"a configuration must hold plain values, got {type(value).__name__}")

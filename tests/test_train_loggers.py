"""Metrics to TensorBoard and to Weights & Biases (offline), begun and gone on with."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modaltune.errors import InputError
from modaltune.run_config import RunConfig
from modaltune.testing_training import tiny_run_config, write_training_cases
from modaltune.train_metrics import check_loggers
from modaltune.train_run import run_training
from modaltune.train_signals import TrainingStopped
from modaltune.train_watcher import RunWatcher


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_training_cases(tmp_path_factory.mktemp("study"))


def in_two_parts(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop a run after its seventh step, within an epoch, and go on."""
    real = RunWatcher.step

    def step(self: RunWatcher, training: Any, *rest: Any) -> None:
        if training.epoch == 1 and training.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, training, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunWatcher, "step", step)
        with pytest.raises(TrainingStopped):
            run_training(config)
    run_training(config)


def test_tensorboard_has_every_step_once(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard", reason="needs modaltune[tensorboard]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run_config([cases], tmp_path / "run", "output.tensorboard=true")
    in_two_parts(config, monkeypatch)
    found = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("step/loss")] == list(range(1, 16))
    assert [event.step for event in found.Scalars("validation/loss")] == [5, 10, 15]
    assert found.Scalars("end/busy")[0].value <= 1


def kept_records(path: Path) -> Iterator[bytes]:
    """Yield what wandb wrote: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := 2**15 - at % 2**15) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            yield whole
            whole = b""


def history(folder: Path) -> tuple[set[str], dict[int, dict[str, float]]]:
    """Return run ids and, by step, the numbers that wandb kept on disk to send later."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids: set[str] = set()
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in kept_records(path):
            record = Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                assert {item.key for item in record.run.config.update} >= {"learner", "training"}
            if record.HasField("history"):
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                rows.setdefault(int(values["_step"]), {}).update(values)
    return ids, rows


def test_wandb_goes_on_with_the_run_it_began(
    cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="needs modaltune[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    out = tmp_path / "run"
    in_two_parts(tiny_run_config([cases], out, "output.wandb=study"), monkeypatch)
    ids, rows = history(out / "wandb")
    assert ids == {(out / "wandb" / "id").read_text()}
    assert sorted(rows) == list(range(1, 16))
    assert all("step/loss" in row for row in rows.values())
    assert [step for step, row in rows.items() if "validation/loss" in row] == [5, 10, 15]


@pytest.mark.parametrize(
    ("package", "asked"),
    [("tensorboard", {"wandb": None, "tensorboard": True}),
     ("wandb", {"wandb": "study", "tensorboard": False})],
)  # fmt: skip
def test_what_is_not_installed_is_said_before_anything_is_prepared(
    package: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"pip install 'modaltune\[{package}\]'"):
        check_loggers(**asked)
    check_loggers(tensorboard=False, wandb=None)

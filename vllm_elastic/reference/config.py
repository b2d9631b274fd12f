# SPDX-License-Identifier: Apache-2.0
"""LLaDA's configuration, as the oracle needs it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

# What the forward in llada.py takes for granted. A checkpoint that says otherwise is another model.
ASSUMED: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}


@dataclass(frozen=True)
class LLaDAConfig:
    """The keys of LLaDA's own ``config.json`` that change what is computed.

    ``embedding_size`` is the number of rows of the embedding and of the head, ``vocab_size``
    the number of tokens; the rows between the two are padding and never predicted.
    ``eos_token_id`` None: no token ends an answer. ``logits_shift`` is not LLaDA's: position m is
    predicted from row m (0), or from row m - 1 (1), as Dream has it.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    mlp_hidden_size: int
    vocab_size: int
    embedding_size: int
    max_sequence_length: int
    rope_theta: float
    rms_norm_eps: float
    weight_tying: bool
    mask_token_id: int
    eos_token_id: int | None
    logits_shift: int = 0

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.head_dim % 2:
            raise ValueError(f"d_model {self.d_model} over {self.n_heads} heads: odd or fractional")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads do not share {self.n_kv_heads} KV heads evenly")
        if self.embedding_size < self.vocab_size:
            raise ValueError(f"embedding_size {self.embedding_size} < vocab_size {self.vocab_size}")
        if self.logits_shift not in (0, 1):
            raise ValueError(f"logits_shift is {self.logits_shift}, must be 0 or 1")
        if not 0 <= self.mask_token_id < self.embedding_size:
            raise ValueError(f"mask_token_id {self.mask_token_id} has no embedding")

    @property
    def head_dim(self) -> int:
        """Entries of one head's query, key or value."""
        return self.d_model // self.n_heads

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> LLaDAConfig:
        """Read LLaDA's keys out of ``raw``; keys without meaning here are ignored.

        ``n_kv_heads``, ``embedding_size`` and ``mlp_hidden_size`` may be null or absent, with the
        meaning LLaDA gives that: as many as the heads, as the vocabulary, ``mlp_ratio * d_model``.

        Raises:
            ValueError: a key is missing, or the checkpoint is of an architecture not done here.
        """
        for key, assumed in ASSUMED.items():
            if raw.get(key, assumed) != assumed:
                raise ValueError(f"config has {key}={raw[key]!r}; the oracle assumes {assumed!r}")
        known = {key: raw[key] for key in (f.name for f in fields(cls)) if raw.get(key) is not None}
        known.setdefault("n_kv_heads", raw.get("n_heads"))
        known.setdefault("embedding_size", raw.get("vocab_size"))
        known.setdefault("eos_token_id", None)
        known.setdefault("logits_shift", 0)
        if raw.get("mlp_ratio") is not None and raw.get("d_model") is not None:
            known.setdefault("mlp_hidden_size", int(raw["mlp_ratio"] * raw["d_model"]))
        missing = [f.name for f in fields(cls) if f.name not in known]
        if missing:
            raise ValueError(f"config lacks {', '.join(missing)}")
        return cls(**known)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> LLaDAConfig:
        """Read ``directory/config.json``. Raises as ``from_dict`` does."""
        return cls.from_dict(json.loads((Path(directory) / "config.json").read_text()))

    def to_dict(self) -> dict[str, Any]:
        """The contents of a ``config.json`` that LLaDA's own code and other engines can read."""
        return {
            "architectures": ["LLaDAModelLM"],
            "model_type": "llada",
            **ASSUMED,
            **asdict(self),
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "residual_dropout": 0.0,
            "bias_for_layer_norm": False,
            "flash_attention": False,
            "init_device": "meta",
            "mlp_ratio": 4,
            "multi_query_attention": None,
            "pad_token_id": self.eos_token_id,
            "use_cache": False,
        }

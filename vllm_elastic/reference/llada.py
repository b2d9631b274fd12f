# SPDX-License-Identifier: Apache-2.0
"""LLaDA's forward in plain PyTorch, cut where Elastic-Cache needs to cut it.

Shapes: R rows (canvas positions being computed), T positions of the canvas, d = d_model,
H heads, K key/value heads, D entries a head. One request at a time, so no batch dimension.
This file knows nothing about canvases, caches or decoding.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from .config import LLaDAConfig

EMBEDDING = "model.transformer.wte.weight"
FINAL_NORM = "model.transformer.ln_f.weight"
HEAD = "model.transformer.ff_out.weight"


def weight_shapes(config: LLaDAConfig) -> dict[str, tuple[int, ...]]:
    """LLaDA's Hugging Face weight names and their shapes; linear weights are (out, in)."""
    d, mlp, rows = config.d_model, config.mlp_hidden_size, config.embedding_size
    kv = config.n_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, d), FINAL_NORM: (d,)}
    if not config.weight_tying:
        shapes[HEAD] = (rows, d)
    of_block = {
        "attn_norm": (d,), "q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d),
        "attn_out": (d, d),
        "ff_norm": (d,), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp),
    }  # fmt: skip
    for layer in range(config.n_layers):
        for name, shape in of_block.items():
            shapes[f"model.transformer.blocks.{layer}.{name}.weight"] = shape
    return shapes


class LLaDA:
    """LLaDA: a Llama without a causal mask. Weights are kept under their Hugging Face names.

    ``weights`` must hold what ``weight_shapes`` lists; more is ignored. All of one dtype and on
    one device, which is where everything is computed.

    Raises:
        ValueError: a weight is missing or has the wrong shape.
    """

    def __init__(self, config: LLaDAConfig, weights: dict[str, Tensor]) -> None:
        for name, shape in weight_shapes(config).items():
            found = tuple(weights[name].shape) if name in weights else "nothing"
            if found != shape:
                raise ValueError(f"{name}: expected {shape}, found {found}")
        self.config = config
        # Detached: nothing here is trained, and no graph is to grow over a decoding.
        self.weights = {name: weights[name].detach() for name in weight_shapes(config)}
        # RoPE's angles are float32 whatever the weights are (LLaDA: rope_full_precision).
        size, length, device = config.head_dim, config.max_sequence_length, self.device
        half = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = positions[:, None] / config.rope_theta**half  # (max_sequence_length, D/2)
        angles = torch.cat([angles, angles], dim=-1)
        self._cos, self._sin = angles.cos(), angles.sin()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights, hidden states, keys and values."""
        return self.weights[EMBEDDING].dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.weights[EMBEDDING].device

    # ---- where weights come from and go to

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> LLaDA:
        """Load ``config.json`` and every ``*.safetensors`` of ``directory``."""
        directory = Path(directory)
        weights: dict[str, Tensor] = {}
        for shard in sorted(directory.glob("*.safetensors")):
            weights.update(load_file(shard))
        weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
        return cls(LLaDAConfig.from_pretrained(directory), weights)

    @classmethod
    def random(
        cls,
        config: LLaDAConfig,
        seed: int = 0,
        init_scale: float = 2.0,
        dtype: torch.dtype = torch.float32,
    ) -> LLaDA:
        """Seeded random weights with structure enough to test decoding on.

        Linear weights are normal with deviation ``init_scale / sqrt(inputs)``: queries, keys and
        logits then have about the deviation ``init_scale``. At 1 and below attention is nearly
        uniform, similarities stay above 0.95 and confidences near 1 / vocabulary; at 2 (4
        layers, some 10 to 100 tokens) similarities are 0.7 to 1, so that gamma 0.9 triggers in
        changing layers, and confidences 0.1 to 0.7. Norm weights are spread around 1, so that a
        mixed-up norm shows.
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        weights = {}
        for name, shape in weight_shapes(config).items():
            drawn = torch.randn(shape, generator=generator, device="cpu")
            if len(shape) == 1:
                drawn = 1 + 0.1 * drawn
            elif name != EMBEDDING or config.weight_tying:
                drawn = drawn * (init_scale / math.sqrt(shape[1]))
            weights[name] = drawn.to(dtype)
        return cls(config, weights)

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``, as a LLaDA checkpoint has them."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        raw = self.config.to_dict() | {"torch_dtype": str(self.dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        contiguous = {name: w.detach().cpu().contiguous() for name, w in self.weights.items()}
        save_file(contiguous, directory / "model.safetensors", metadata={"format": "pt"})

    # ---- the forward, piece by piece

    def embed(self, token_ids: Tensor) -> Tensor:
        """(R,) token ids -> (R, d) hidden states, the input of layer 0."""
        return self.weights[EMBEDDING][token_ids]

    def project(self, layer: int, hidden: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of some positions, RoPE applied.

        ``hidden`` (R, d) is their hidden state at this layer's input, ``rows`` (R,) their canvas
        positions. Returns q (H, R, D), k (K, R, D), v (K, R, D).
        """
        x = self._norm(hidden, self._block(layer, "attn_norm"))
        q, k, v = (self._heads(layer, name, x) for name in ("q_proj", "k_proj", "v_proj"))
        return self._rope(q, rows), self._rope(k, rows), v

    def queries(self, layer: int, hidden: Tensor, rows: Tensor) -> Tensor:
        """The queries of ``project`` alone: (H, R, D)."""
        x = self._norm(hidden, self._block(layer, "attn_norm"))
        return self._rope(self._heads(layer, "q_proj", x), rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query over all keys: q (H, R, D), k and v (K, T, D) -> (R, d), heads joined.

        With shared KV heads, query head h reads KV head h // (H / K). As nothing is masked, the
        queries of the heads that share one are just more rows of it, and nothing is repeated.
        """
        heads, rows, _ = q.shape
        grouped = q.reshape(len(k), -1, self.config.head_dim)  # (K, H/K * R, D)
        out = F.scaled_dot_product_attention(grouped[None], k[None], v[None])
        return out.view(heads, rows, -1).transpose(0, 1).reshape(rows, -1)

    def attention_rows(self, q: Tensor, k: Tensor) -> Tensor:
        """The attention probabilities of ``attend``: q (H, R, D), k (K, T, D) -> (H, R, T) float32.

        Apart from ``attend``, because they are needed for a few rows only: the tracked positions
        and the window.
        """
        heads, rows, size = q.shape
        scores = q.reshape(len(k), -1, size) @ k.transpose(1, 2) / math.sqrt(size)
        return scores.float().softmax(dim=-1).view(heads, rows, -1)

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block: (R, d) its input, (R, d) from ``attend`` -> (R, d) its output."""
        hidden = hidden + F.linear(attended, self._block(layer, "attn_out"))
        x = self._norm(hidden, self._block(layer, "ff_norm"))
        gate = F.silu(F.linear(x, self._block(layer, "ff_proj")))
        up = F.linear(x, self._block(layer, "up_proj"))
        return hidden + F.linear(gate * up, self._block(layer, "ff_out"))

    def head(self, hidden: Tensor) -> Tensor:
        """(R, d) output of the last layer -> (R, vocab_size) logits, padding rows left out."""
        weight = self.weights[EMBEDDING if self.config.weight_tying else HEAD]
        x = self._norm(hidden, self.weights[FINAL_NORM])
        return F.linear(x, weight[: self.config.vocab_size])

    def forward(self, token_ids: Tensor) -> Tensor:
        """The whole canvas without a cache: (T,) token ids -> (T, d) output of the last layer.

        The logits are ``head`` of the rows that are wanted.
        """
        rows = torch.arange(len(token_ids), device=self.device)
        hidden = self.embed(token_ids)
        for layer in range(self.config.n_layers):
            q, k, v = self.project(layer, hidden, rows)
            hidden = self.finish(layer, hidden, self.attend(q, k, v))
        return hidden

    # ---- inside

    def _block(self, layer: int, name: str) -> Tensor:
        return self.weights[f"model.transformer.blocks.{layer}.{name}.weight"]

    def _heads(self, layer: int, name: str, x: Tensor) -> Tensor:
        """One of the projections, cut into heads: (R, d) -> (heads, R, D)."""
        out = F.linear(x, self._block(layer, name))
        return out.view(len(x), -1, self.config.head_dim).transpose(0, 1)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm in float32 over the last dimension, scaled in the model's dtype."""
        wide = x.float()
        variance = wide.square().mean(dim=-1, keepdim=True)
        return weight * (wide * torch.rsqrt(variance + self.config.rms_norm_eps)).to(x.dtype)

    def _rope(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rotate-half RoPE in float32: (heads, R, D) at canvas positions ``rows`` (R,)."""
        wide = x.float()
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return (wide * self._cos[rows] + turned * self._sin[rows]).to(x.dtype)

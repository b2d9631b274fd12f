"""The tiny LLaDA as it is trained: plain PyTorch, with LLaDA's own weight names.

Knows nothing about tasks, tokens or masks. The engine and the oracle have their own forward;
this one is written for a fast backward on a CPU.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

# Of the initial weights: what every embedding has in its first place, and how the first layer's
# heads turn it into attention to a neighbour (contrast about 4 nats) at these offsets.
CONSTANT = 6.0
SHARPNESS = 1.2
NEIGHBOURS = (-1, -1, 1, 1, -2, 2)


@dataclass(frozen=True)
class Shape:
    """The sizes of a LLaDA, named as in its `config.json`."""

    vocab_size: int
    embedding_size: int
    d_model: int = 192
    n_heads: int = 6
    n_layers: int = 8
    mlp_hidden_size: int = 512
    max_sequence_length: int = 2048
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32, with a learnt scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


def rope_tables(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_size] of the rotate-half RoPE, float32."""
    half = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.arange(length, dtype=torch.float32)[:, None] / shape.rope_theta**half
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [batch, heads, positions, head_size] in float32."""
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Block(nn.Module):
    """One pre-norm layer: bidirectional attention, then a SwiGLU MLP; no biases."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, mlp = shape.d_model, shape.mlp_hidden_size
        self.heads, self.head_size = shape.n_heads, shape.head_size
        self.attn_norm = RMSNorm(width, shape.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.ff_norm = RMSNorm(width, shape.rms_norm_eps)
        self.ff_proj = nn.Linear(width, mlp, bias=False)
        self.up_proj = nn.Linear(width, mlp, bias=False)
        self.ff_out = nn.Linear(mlp, width, bias=False)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, each [batch, heads, positions, head_size]."""
        batch, length, _ = x.shape
        split = (batch, length, self.heads, self.head_size)
        normed = self.attn_norm(x)
        q = rotate(self.q_proj(normed).view(split).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(normed).view(split).transpose(1, 2), cos, sin)
        v = self.v_proj(normed).view(split).transpose(1, 2)
        return (q * self.head_size**-0.5).contiguous(), k.contiguous(), v.contiguous()

    def after(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Add the attention's and the MLP's output to the residual stream."""
        x = x + self.attn_out(mixed.transpose(1, 2).reshape(x.shape))
        normed = self.ff_norm(x)
        return x + self.ff_out(F.silu(self.ff_proj(normed)) * self.up_proj(normed))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map [batch, positions, width] to the same; `bias` is added to the attention scores."""
        q, k, v = self.before(x, cos, sin)
        # Two batched products and a softmax in the weights' dtype: on a CPU with AMX four times
        # as fast as SDPA's backward or a float32 softmax.
        scores = q @ k.transpose(2, 3)
        if bias is not None:
            scores = scores + bias
        return self.after(x, scores.softmax(-1) @ v)


class TinyLLaDA(nn.Module):
    """The whole model; `state_dict()` has the names of GSAI-ML's checkpoints."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(shape.embedding_size, shape.d_model),
                "blocks": nn.ModuleList(Block(shape) for _ in range(shape.n_layers)),
                "ln_f": RMSNorm(shape.d_model, shape.rms_norm_eps),
                "ff_out": nn.Linear(shape.d_model, shape.embedding_size, bias=False),
            }
        )
        self.model = nn.ModuleDict({"transformer": transformer})
        cos, sin = rope_tables(shape, shape.max_sequence_length)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def init_weights(self, seed: int) -> None:
        """Small normal weights; what writes into the residual stream starts at zero.

        Three things are put in from the start, since training takes millions of tokens to find
        them or never does (cf. Trockman and Kolter, arXiv 2305.09828, on mimetic initialisation):
        a head that copies, heads of the first layer that see the neighbouring tokens, and heads
        of the next layers that attend to positions like their own.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if weight.ndim < 2:
                nn.init.ones_(weight)
            elif "attn_out" in name or "ff_out" in name:
                nn.init.zeros_(weight)
            elif "wte" in name:
                nn.init.normal_(weight, std=1.0, generator=generator)
            else:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)
        parts = self.model["transformer"]
        with torch.no_grad():
            # An untied head that starts as a faint copy of the embedding: else copying a word has
            # to be learnt for every word by itself, and nothing is copied for millions of tokens.
            parts["ff_out"].weight.copy_(0.1 * parts["wte"].weight)
            parts["wte"].weight[:, 0] = CONSTANT
            parts["ff_out"].weight[:, 0] = 0
            for head, offset in enumerate(NEIGHBOURS[: self.shape.n_heads]):
                self._see_neighbour(parts["blocks"][0], head, offset, generator)
            for block in list(parts["blocks"])[1:4]:
                rows = slice(0, self.shape.n_heads // 2 * self.shape.head_size)
                block.q_proj.weight[rows, 0] = 0
                block.k_proj.weight[rows] = block.q_proj.weight[rows]

    def _see_neighbour(self, block: Block, head: int, offset: int, generator: Generator) -> None:
        """Make a head attend to the position `offset` from its own, whatever stands there.

        The fast frequencies of queries and keys depend on the embedding's constant feature only,
        the keys turned by `-offset`; values pass a random projection of the neighbour's token on.
        """
        size = self.shape.head_size
        pairs = torch.arange(5)
        angles = offset / self.shape.rope_theta ** (2 * pairs / size)
        first, second = head * size + pairs, head * size + size // 2 + pairs
        for projection in (block.q_proj, block.k_proj):
            projection.weight[torch.cat([first, second])] = 0
        block.q_proj.weight[first, 0] = SHARPNESS
        block.k_proj.weight[first, 0] = SHARPNESS * angles.cos()
        block.k_proj.weight[second, 0] = -SHARPNESS * angles.sin()
        rows = slice(head * size, (head + 1) * size)
        block.v_proj.weight[rows, 0] = 0
        written = torch.randn(self.shape.d_model, size, generator=generator)
        block.attn_out.weight[:, rows] = written * self.shape.d_model**-0.5

    def hidden(self, token_ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """Final normed hidden states [batch, positions, d_model] of token ids."""
        return self.through_layers(self.model["transformer"]["wte"](token_ids), bias)

    def through_layers(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Final normed hidden states of embeddings, both [batch, positions, d_model]."""
        parts = self.model["transformer"]
        length = x.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        for block in parts["blocks"]:
            x = block(x, cos, sin, bias)
        return parts["ln_f"](x)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., embedding_size] of hidden states."""
        return self.model["transformer"]["ff_out"](hidden)

    def forward(self, token_ids: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [batch, positions, embedding_size] of token ids [batch, positions]."""
        return self.head(self.hidden(token_ids, bias))


def config_dict(shape: Shape, mask_token_id: int, eos_token_id: int) -> dict[str, object]:
    """`config.json` with the keys of GSAI-ML/LLaDA-8B's, for this shape."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **asdict(shape),
        "n_kv_heads": shape.n_heads,
        "mlp_ratio": 4,
        "mask_token_id": mask_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": eos_token_id,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "weight_tying": False,
        "rope": True,
        "rope_full_precision": True,
        "alibi": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "use_cache": False,
        "torch_dtype": "bfloat16",
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> TinyLLaDA:
    """The model of a checkpoint folder (`config.json`, `model.safetensors`)."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{key: config[key] for key in Shape.__dataclass_fields__})
    model = TinyLLaDA(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()

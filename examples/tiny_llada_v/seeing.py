# SPDX-License-Identifier: Apache-2.0
"""The tiny LLaDA-V as it is trained: a SigLIP tower, a projector, and the tiny LLaDA behind them.

Plain PyTorch, for a fast backward on a CPU; shares no code with the engine.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tiny_llada"))
from model import CONSTANT, NEIGHBOURS, Shape, TinyLLaDA

# LLaDA-V's names of LLaDA's tensors, of the tower's and of the projector's; the order matters.
NAMES = (
    ("language.model.transformer.blocks.", "model.layers."),
    ("language.model.transformer.wte.", "model.embed_tokens."),
    ("language.model.transformer.ln_f.", "model.norm."),
    ("language.model.transformer.ff_out.", "lm_head."),
    ("tower.", "model.vision_tower.vision_tower.vision_model."),
    ("projector.", "model.mm_projector."),
    ("newline", "model.image_newline"),
    (".attn_norm.", ".input_layernorm."),
    (".ff_norm.", ".post_attention_layernorm."),
    (".ff_proj.", ".mlp.gate_proj."),
    (".up_proj.", ".mlp.up_proj."),
    (".ff_out.", ".mlp.down_proj."),
    (".attn_out.", ".self_attn.o_proj."),
)
PROJECTIONS = (".q_proj.", ".k_proj.", ".v_proj.")


@dataclass(frozen=True)
class TowerShape:
    """Sizes of a SigLIP, named as in its `config.json`. Its last layer is not used (LLaDA-V)."""

    hidden_size: int = 96
    intermediate_size: int = 192
    num_hidden_layers: int = 3
    num_attention_heads: int = 3
    image_size: int = 96
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    @property
    def patches(self) -> int:
        """Patches of a tile's side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SeenWords:
    """Token ids of what patches are described by; squares in reading order."""

    squares: list[int]
    colors: list[int]
    shapes: list[int]


class TowerAttention(nn.Module):
    """Bidirectional attention with biases."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            projection(x).view(split).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class TowerMLP(nn.Module):
    """Two products with GELU (its tanh form) between them."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TowerLayer(nn.Module):
    """One pre-norm layer."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.self_attn = TowerAttention(shape)
        self.layer_norm2 = nn.LayerNorm(shape.hidden_size, shape.layer_norm_eps)
        self.mlp = TowerMLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Tower(nn.Module):
    """SigLIP up to its last layer but one, without the norm behind; its names."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        patch = (shape.patch_size, shape.patch_size)
        self.embeddings = nn.ModuleDict(
            {
                "patch_embedding": nn.Conv2d(3, shape.hidden_size, patch, patch),
                "position_embedding": nn.Embedding(shape.patches**2, shape.hidden_size),
            }
        )
        layers = (TowerLayer(shape) for _ in range(shape.num_hidden_layers - 1))
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})

    def forward(self, tiles: Tensor) -> Tensor:
        """[tiles, patches, width] of tiles [tiles, 3, side, side]."""
        seen = self.embeddings["patch_embedding"](tiles).flatten(2).transpose(1, 2)
        x = seen + self.embeddings["position_embedding"].weight
        for layer in self.encoder["layers"]:
            x = layer(x)
        return x


class TinyLLaDAV(nn.Module):
    """The whole model. A picture is one tile: the overview, then the same again with newlines."""

    def __init__(self, shape: Shape, tower: TowerShape, image_token: int) -> None:
        super().__init__()
        self.shape, self.tower_shape, self.image_token = shape, tower, image_token
        self.language = TinyLLaDA(shape)
        self.tower = Tower(tower)
        self.projector = nn.Sequential(
            nn.Linear(tower.hidden_size, shape.d_model),
            nn.GELU(),
            nn.Linear(shape.d_model, shape.d_model),
        )
        self.newline = nn.Parameter(torch.zeros(shape.d_model))

    @property
    def positions(self) -> int:
        """Canvas positions of a picture."""
        side = self.tower_shape.patches
        return side**2 + side * (side + 1)

    def init_weights(
        self, seed: int, language: dict[str, Tensor], moved: dict[int, int], words: SeenWords
    ) -> None:
        """A trained LLaDA whose new words take trained words' places, and a tower to go with it.

        The trained LLaDA looks up the value behind a key: its first layer tells each position its
        left neighbours, and heads behind find the position whose neighbour is the same. So a patch
        starts as the value in a table would be after that layer: what is on it and where it is,
        as words, and as neighbours of what is asked for. The projector starts linear
        (gelu(x) - gelu(-x) = x), a feature of the tower for each word.

        Args:
            language: the trained weights.
            moved: new token ids to the trained ids whose rows they take.
            words: ids of the words that a patch is described by.
        """
        draws = torch.Generator().manual_seed(seed)
        for module in self.tower.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                nn.init.normal_(module.weight, std=fan_in**-0.5, generator=draws)
                nn.init.zeros_(module.bias)
        for layer in self.tower.encoder["layers"]:
            nn.init.zeros_(layer.self_attn.out_proj.weight)
            nn.init.zeros_(layer.mlp.fc2.weight)
        with torch.no_grad():
            self._move_words(language, moved, draws)
            patch = self.tower.embeddings["patch_embedding"]
            patch.weight *= 0.1
            patch.weight[: len(words.squares)] = 0
            place = self.tower.embeddings["position_embedding"].weight
            place.zero_().fill_diagonal_(1)
            inner, width = self.tower_shape.hidden_size, self.shape.d_model
            spread = torch.randn(width, inner, generator=draws) * 0.5
            meant = self.meaning(words)
            spread[:, : len(meant)] = meant.T
            spread[0] = 0
            into, out = self.projector[0], self.projector[2]
            into.weight.copy_(torch.cat([torch.eye(inner), -torch.eye(inner)]))
            out.weight.copy_(torch.cat([spread, -spread], dim=1))
            nn.init.zeros_(into.bias)
            nn.init.zeros_(out.bias)
            out.bias[0] = CONSTANT
            self.newline.copy_(torch.randn(width, generator=draws))
            self.newline[0] = CONSTANT

    def _move_words(
        self, language: dict[str, Tensor], moved: dict[int, int], draws: torch.Generator
    ) -> None:
        own = self.language.state_dict()
        for name, weight in own.items():
            weight[: len(language[name])].copy_(language[name])
        for part in ("wte", "ff_out"):
            rows = own[f"model.transformer.{part}.weight"]
            trained = rows.clone()
            empty = torch.randn(rows.shape, generator=draws)
            empty[:, 0] = CONSTANT
            if part == "ff_out":
                empty.zero_()
            fresh = [*moved.values(), *range(min(moved), len(rows))]
            rows[fresh] = empty[fresh]
            rows[list(moved)] = trained[list(moved.values())]

    def meaning(self, words: SeenWords) -> Tensor:
        """What each word adds to a patch's row [squares + colors + shapes, d_model], at the start.

        Itself, and what the first layer makes of it as a neighbour to the left: a square is asked
        for by the name one or two positions before, a thing by its shape and, before it, its color.
        """
        parts = self.language.model["transformer"]
        first, embedding = parts["blocks"][0], parts["wte"].weight

        def neighbours(ids: list[int], offsets: tuple[int, ...]) -> Tensor:
            values = first.v_proj(first.attn_norm(embedding[ids]))
            size = first.head_size
            seen = torch.zeros_like(values)
            for head, offset in enumerate(NEIGHBOURS):
                if offset in offsets:
                    seen[:, head * size : (head + 1) * size] = values[
                        :, head * size : (head + 1) * size
                    ]
            return first.attn_out(seen)

        return torch.cat(
            [
                embedding[ids] + neighbours(ids, offsets)
                for ids, offsets in (
                    (words.squares, (-1, -2)),
                    (words.colors, (-2,)),
                    (words.shapes, (-1,)),
                )
            ]
        )

    def rows(self, tiles: Tensor) -> Tensor:
        """[pictures, patches, d_model] of tiles [pictures, 3, side, side]."""
        return self.projector(self.tower(tiles))

    def on_canvas(self, rows: Tensor) -> Tensor:
        """[pictures, positions, d_model]: a picture's patches twice, as LLaDA-V lays them out."""
        pictures, side = len(rows), self.tower_shape.patches
        grid = rows.view(pictures, side, side, -1)
        newlines = self.newline.expand(pictures, side, 1, -1)
        return torch.cat([rows, torch.cat([grid, newlines], dim=2).flatten(1, 2)], dim=1)

    def embedded(self, token_ids: Tensor, tiles: Tensor) -> Tensor:
        """Layer 0's input [batch, positions, d_model], each row with one picture."""
        x = self.language.model["transformer"]["wte"](token_ids)
        seen = self.on_canvas(self.rows(tiles)).flatten(0, 1)
        at = (token_ids.flatten() == self.image_token).nonzero().squeeze(1)
        return x.flatten(0, 1).index_copy(0, at, seen).view(x.shape)

    def hidden(self, token_ids: Tensor, tiles: Tensor) -> Tensor:
        """Final normed hidden states [batch, positions, d_model]."""
        return self.language.through_layers(self.embedded(token_ids, tiles))

    def forward(self, token_ids: Tensor, tiles: Tensor) -> Tensor:
        """Logits [batch, positions, embedding_size]."""
        return self.language.head(self.hidden(token_ids, tiles))


def tile(image: Any, side: int) -> Tensor:
    """[3, side, side] of a picture, as LLaDA-V's processor makes it: bicubic, to -1..1."""
    import numpy as np
    from PIL import Image

    scaled = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(scaled, np.float32)).permute(2, 0, 1)
    return (pixels / 255 - 0.5) / 0.5


def published_name(name: str) -> str:
    """LLaDA-V's name of a weight."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    if not name.startswith("model.vision_tower."):
        for projection in PROJECTIONS:
            name = name.replace(projection, f".self_attn{projection}")
    return name


def load(folder: Path) -> TinyLLaDAV:
    """The model of a checkpoint folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    shape = Shape(
        vocab_size=config["vocab_size"],
        embedding_size=config["embedding_size"],
        d_model=config["hidden_size"],
        n_heads=config["num_attention_heads"],
        n_layers=config["num_hidden_layers"],
        mlp_hidden_size=config["intermediate_size"],
        max_sequence_length=config["max_position_embeddings"],
        rope_theta=config["rope_theta"],
        rms_norm_eps=config["rms_norm_eps"],
    )
    tower = TowerShape(**{key: vision[key] for key in TowerShape.__dataclass_fields__})
    model = TinyLLaDAV(shape, tower, config["image_token_id"])
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: weights[published_name(name)] for name in model.state_dict()})
    return model.eval()

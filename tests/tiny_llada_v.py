# SPDX-License-Identifier: Apache-2.0
"""A LLaDA-V of random weights with a small tower, and what its images become by another path.

That path is transformers' image processor, SigLIP and packing of features, a projector of two plain
products, and the oracle's LLaDA; nothing of it is the engine's.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from vllm_elastic.reference import LLaDA, LLaDAConfig
from vllm_elastic.reference.llada import EMBEDDING, HEAD

WORDS = 280
START, HEADER, HEADER_END, IMAGE, TURN, END, MASK = 280, 281, 282, 283, 284, 290, 291
NEVER = (END, START, HEADER, HEADER_END)
TILE, PATCH, MAX_TILES, GRIDS = 56, 14, 2, 3
SPECIAL = {
    START: "<|startoftext|>",
    HEADER: "<|start_header_id|>",
    HEADER_END: "<|end_header_id|>",
    IMAGE: "<|reserved_token_0|>",
    TURN: "<|eot_id|>",
    END: "<|endoftext|>",
    MASK: "<|mdm_mask|>",
}
TOWER: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=TILE,
    patch_size=PATCH,
    hidden_act="gelu_pytorch_tanh",
    layer_norm_eps=1e-6,
)
# LLaDA-V's names of LLaDA's tensors; the order matters.
NAMES = (
    ("model.transformer.blocks.", "model.layers."),
    ("model.transformer.wte.", "model.embed_tokens."),
    ("model.transformer.ln_f.", "model.norm."),
    ("model.transformer.ff_out.", "lm_head."),
    (".q_proj.", ".self_attn.q_proj."),
    (".k_proj.", ".self_attn.k_proj."),
    (".v_proj.", ".self_attn.v_proj."),
    (".attn_out.", ".self_attn.o_proj."),
    (".ff_proj.", ".mlp.gate_proj."),
    (".up_proj.", ".mlp.up_proj."),
    (".ff_out.", ".mlp.down_proj."),
    (".attn_norm.", ".input_layernorm."),
    (".ff_norm.", ".post_attention_layernorm."),
)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise: every pixel counts."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TinyLLaDAV:
    """The model in the oracle, its tower in transformers."""

    def __init__(self, seed: int = 3, max_sequence_length: int = 256) -> None:
        from transformers import SiglipVisionConfig, SiglipVisionModel

        self.oracle = LLaDA.random(
            LLaDAConfig(
                d_model=128,
                n_heads=4,
                n_kv_heads=4,
                n_layers=4,
                mlp_hidden_size=224,
                vocab_size=293,
                embedding_size=320,
                max_sequence_length=max_sequence_length,
                rope_theta=500000.0,
                rms_norm_eps=1e-5,
                weight_tying=False,
                mask_token_id=MASK,
                eos_token_id=TURN,
            ),
            seed=seed,
        )
        torch.manual_seed(seed)
        self.tower = SiglipVisionModel(SiglipVisionConfig(**TOWER)).eval()
        for parameter in self.tower.parameters():
            # Spread out, so that a part that is left out or mixed up shows.
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.2)
        width, inner = self.oracle.config.d_model, TOWER["hidden_size"]
        self.projector = {
            "0.weight": torch.randn(width, inner) / inner**0.5,
            "0.bias": torch.randn(width) * 0.1,
            "2.weight": torch.randn(width, width) / width**0.5,
            "2.bias": torch.randn(width) * 0.1,
        }
        self.newline = torch.randn(width)

    # ---- the checkpoint

    def save(self, directory: Path, **config: Any) -> None:
        """Write it as LLaDA-V's is written; ``config`` stands in place of config.json's values."""
        directory.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, weight in self.oracle.weights.items():
            for ours, theirs in NAMES:
                name = name.replace(ours, theirs)
            weights[name] = weight
        for name, weight in self.tower.state_dict().items():
            name = name.removeprefix("vision_model.")
            if not name.startswith(("head.", f"encoder.layers.{TOWER['num_hidden_layers'] - 1}.")):
                weights[f"model.vision_tower.vision_tower.vision_model.{name}"] = weight
        weights |= {f"model.mm_projector.{name}": w for name, w in self.projector.items()}
        weights["model.image_newline"] = self.newline
        save_file({k: w.contiguous() for k, w in weights.items()}, directory / "model.safetensors")
        raw = self.config_json() | config
        (directory / "config.json").write_text(json.dumps(raw))
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
        self._save_tokenizer(directory)

    def config_json(self) -> dict[str, Any]:
        text = self.oracle.config
        return {
            "architectures": ["LlavaLLaDAModelLM"],
            "model_type": "llava_llada",
            "hidden_size": text.d_model,
            "intermediate_size": text.mlp_hidden_size,
            "num_hidden_layers": text.n_layers,
            "num_attention_heads": text.n_heads,
            "num_key_value_heads": text.n_kv_heads,
            "max_position_embeddings": text.max_sequence_length,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": None,
            "attention_bias": False,
            "tie_word_embeddings": False,
            "vocab_size": text.vocab_size,
            "embedding_size": text.embedding_size,
            "bos_token_id": 128000,
            "eos_token_id": END,
            "mask_token_id": MASK,
            "torch_dtype": "float32",
            "mm_vision_tower": "a/path/to/siglip2-tiny",
            "mm_projector_type": "mlp2x_gelu",
            "mm_hidden_size": TOWER["hidden_size"],
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_patch_merge_type": "spatial_unpad",
            "image_aspect_ratio": f"anyres_max_{MAX_TILES}",
            "image_grid_pinpoints": [
                [TILE * w, TILE * h] for w in range(1, GRIDS + 1) for h in range(1, GRIDS + 1)
            ],
            "vision_config": TOWER,
            "image_token_id": IMAGE,
            "never_chosen_ids": list(NEVER),
        }

    @staticmethod
    def _save_tokenizer(directory: Path) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        vocabulary = {f"w{i}": i for i in range(WORDS)} | {text: i for i, text in SPECIAL.items()}
        vocabulary |= {f"unused{i}": i for i in range(293) if i not in vocabulary.values()}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL.values()])
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIAL[START],
            "eos_token": SPECIAL[END],
            "mask_token": SPECIAL[MASK],
            "unk_token": "w0",
            "clean_up_tokenization_spaces": False,
            "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))

    # ---- the other path

    @torch.no_grad()
    def features(self, image: Image.Image, among: int = 1) -> Tensor:
        """[positions, d] of one image of ``among`` in its prompt."""
        from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
            LlavaOnevisionImageProcessorPil,
        )
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            LlavaOnevisionModel,
        )

        grids = [[TILE * h, TILE * w] for w in range(1, GRIDS + 1) for h in range(1, GRIDS + 1)]
        processor = LlavaOnevisionImageProcessorPil(
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
            size={"height": TILE, "width": TILE},
            image_grid_pinpoints=grids,
        )
        if among > 1:
            side = max(image.size)
            square = Image.new("RGB", (side, side), (127, 127, 127))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            tiles = processor(images=square, return_tensors="pt")["pixel_values"][0, :1]
        else:
            tiles = processor(images=image, return_tensors="pt")["pixel_values"][0]
        seen = self.tower(tiles, output_hidden_states=True).hidden_states[-2]
        inner = F.gelu(F.linear(seen, self.projector["0.weight"], self.projector["0.bias"]))
        rows = F.linear(inner, self.projector["2.weight"], self.projector["2.bias"])
        if among > 1:
            return torch.cat([rows[0], self.newline[None]])
        config = SimpleNamespace(
            vision_config=SimpleNamespace(image_size=TILE, patch_size=PATCH),
            image_grid_pinpoints=grids,
        )
        packed, _ = LlavaOnevisionModel.pack_image_features(
            SimpleNamespace(config=config),
            [rows],
            torch.tensor([[image.height, image.width]]),
            image_newline=self.newline,
            vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
        )
        return packed[0]

    def seeing(self, prompt: list[int], features: list[Tensor]) -> tuple[LLaDA, list[int]]:
        """The oracle that knows some features as tokens, and the prompt with them in it.

        Each row of features is one more row of the embedding, which no logit belongs to. Each
        ``IMAGE`` of the prompt becomes the tokens of the next features.
        """
        rows = torch.cat(features)
        config = self.oracle.config
        size = config.embedding_size + len(rows)
        weights = dict(self.oracle.weights)
        weights[EMBEDDING] = torch.cat([weights[EMBEDDING], rows])
        weights[HEAD] = torch.cat([weights[HEAD], torch.zeros_like(rows)])
        next_token = config.embedding_size
        written, remaining = [], list(features)
        for token in prompt:
            if token != IMAGE:
                written.append(token)
                continue
            count = len(remaining.pop(0))
            written += range(next_token, next_token + count)
            next_token += count
        return LLaDA(replace(config, embedding_size=size), weights), written

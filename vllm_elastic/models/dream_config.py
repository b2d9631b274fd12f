# SPDX-License-Identifier: Apache-2.0
"""Dream's ``config.json`` as a transformers configuration, without remote code."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

MASK_TOKEN_ID = 151666
"""What Dream's own configuration class has where the file names none."""

END_OF_TEXT_ID = 151643

_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)

_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "use_mrope": False,
    "mlp_bias": False,
    "attention_bias": True,
    "partial_rotary_factor": 1.0,
    "is_causal": False,
}
"""Keys that change what is computed, with the one value that this model computes."""


class DreamConfig(PretrainedConfig):
    """Keys of Dream's config.json, which are Qwen2's and a mask.

    The mask's id is this file's or Dream's own; a generation_config.json, which has a null there,
    is never asked.

    Attributes:
        logits_shift: the candidates of position p are read from row p - 1.
        end_of_turn, stop_tokens: what ends an answer beside the end of text, by name; the last one
            is DiffuCoder's padding.

    Raises:
        ValueError: a size is missing, or an option that this model does not compute; names the key.
    """

    model_type = "Dream"
    has_no_defaults_at_init = True  # transformers would make one without arguments to compare with
    logits_shift = 1
    end_of_turn = "<|im_end|>"
    stop_tokens = (end_of_turn, "<|dlm_pad|>")

    def __init__(
        self,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        missing = [key for key in _SIZES if kwargs.get(key) is None]
        if missing:
            raise ValueError(f"Dream config: {', '.join(missing)} must be given.")
        for key, wanted in _ONLY.items():
            if kwargs.get(key, wanted) != wanted:
                raise ValueError(
                    f"Dream config: {key}={kwargs[key]!r} is not supported, only {wanted!r}."
                )
        self.rope_theta = _plain_rope_theta(kwargs)
        for key in _SIZES:
            setattr(self, key, kwargs.pop(key))
        self._check_heads(kwargs.get("head_dim"))
        kinds = set(kwargs.get("layer_types") or ()) - {"full_attention"}
        if kinds:
            raise ValueError(f"Dream config: layer_types has {min(kinds)!r}, not supported.")
        kwargs["sliding_window"] = None  # not used: vLLM would take the number for a limit
        self.mask_token_id = MASK_TOKEN_ID if mask_token_id is None else mask_token_id
        if self.mask_token_id >= self.vocab_size:
            raise ValueError(
                f"Dream config: mask_token_id {self.mask_token_id} is beyond vocab_size "
                f"{self.vocab_size}."
            )
        super().__init__(
            eos_token_id=END_OF_TEXT_ID if eos_token_id is None else eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    def _check_heads(self, head_dim: int | None) -> None:
        width, heads, shared = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        if width % heads or heads % shared:
            raise ValueError(
                f"Dream config: num_attention_heads {heads} must divide hidden_size {width}, and "
                f"num_key_value_heads {shared} the heads."
            )
        if head_dim not in (None, width // heads):
            raise ValueError(
                f"Dream config: head_dim={head_dim} is not supported, only {width // heads}."
            )


def _plain_rope_theta(keys: dict[str, Any]) -> float:
    """The base of a rotary embedding that nothing scales, taken out of the keys.

    Transformers 4 writes ``rope_theta`` beside ``rope_scaling``, transformers 5 one
    ``rope_parameters``.
    """
    theta = keys.pop("rope_theta", None)
    for name in ("rope_scaling", "rope_parameters"):
        found = keys.pop(name, None) or {}
        theta = found.get("rope_theta", theta)
        kind = found.get("rope_type", found.get("type", "default"))
        if kind != "default" or not found.keys() <= {"rope_type", "type", "rope_theta"}:
            raise ValueError(f"Dream config: {name}={found!r} is not supported, only plain RoPE.")
    if theta is None:
        raise ValueError("Dream config: rope_theta must be given.")
    return float(theta)

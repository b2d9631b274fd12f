# SPDX-License-Identifier: Apache-2.0
"""What configurations with Llama's keys have in common: sizes must be there, options understood."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from vllm_elastic.models.config_options import refuse_options

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
)


class LlamaKeysConfig(PretrainedConfig):
    """A config.json with Llama's keys and no mask.

    A subclass is a family. Neither a size nor the base of the rotary embedding has a default: a
    wrong one would not fail, the model would answer badly.

    Attributes:
        family: what messages call it.
        sizes: keys that the family needs beside Llama's.
        only: keys that change what is computed, with the values that this package computes; a file
            may leave them out.
        own_mask_token_id, own_eos_token_id: where the file has none.
        end_of_turn: its token, by name.
        grow_by: positions that are appended to an answer at a time; 0: all at once.
        qkv_bias: queries, keys and values have a bias.
        per_head_norm: queries and keys are normed, head by head, before they are rotated.

    Raises:
        ValueError: a key is missing or is not understood; names it.
    """

    has_no_defaults_at_init = True  # transformers would make one without arguments to compare with
    family = ""
    sizes: ClassVar[tuple[str, ...]] = ()
    only: ClassVar[dict[str, tuple[Any, ...]]] = {}
    own_mask_token_id = 0
    own_eos_token_id = 0
    end_of_turn: ClassVar[str | None] = None
    grow_by = 0
    qkv_bias = per_head_norm = False

    def __init__(
        self,
        *,
        mask_token_id: int | None = None,
        eos_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.pop("model_type", None)  # the file's, which other families share
        if kwargs.get("num_key_value_heads", 0) is None:  # null: no two heads share one
            kwargs["num_key_value_heads"] = kwargs.get("num_attention_heads")
        missing = [key for key in (*_SIZES, *self.sizes) if kwargs.get(key) is None]
        if missing:
            raise ValueError(f"{self.family} config: {', '.join(missing)} must be given.")
        refuse_options(self.family, kwargs, self.only)
        heads, shared = kwargs["num_attention_heads"], kwargs["num_key_value_heads"]
        if kwargs["hidden_size"] % heads or heads % shared:
            raise ValueError(
                f"{self.family} config: num_attention_heads {heads} must divide hidden_size "
                f"{kwargs['hidden_size']}, and num_key_value_heads {shared} the heads."
            )
        if kwargs.get("head_dim") not in (None, kwargs["hidden_size"] // heads):
            raise ValueError(
                f"{self.family} config: head_dim={kwargs['head_dim']} is not supported, only "
                f"hidden_size / num_attention_heads = {kwargs['hidden_size'] // heads}."
            )
        self.rope_theta = self._plain_rope_theta(kwargs)
        for key in (*_SIZES, *self.sizes):
            setattr(self, key, kwargs.pop(key))
        self.mask_token_id = self.own_mask_token_id if mask_token_id is None else mask_token_id
        if not 0 <= self.mask_token_id < self.vocab_size:
            raise ValueError(
                f"{self.family} config: mask_token_id {self.mask_token_id} is beyond vocab_size "
                f"{self.vocab_size}."
            )
        super().__init__(
            eos_token_id=self.own_eos_token_id if eos_token_id is None else eos_token_id, **kwargs
        )
        self.embedding_size = self.vocab_size  # rows of embedding and head, as LLaDA-8B calls them

    def _plain_rope_theta(self, keys: dict[str, Any]) -> float:
        """The base of a rotary embedding that nothing scales, taken out of the keys.

        Transformers 4 writes ``rope_theta`` beside ``rope_scaling``, transformers 5 one
        ``rope_parameters``.
        """
        theta = keys.pop("rope_theta", None)
        for name in ("rope_scaling", "rope_parameters"):
            found = dict(keys.pop(name, None) or {})
            theta = found.pop("rope_theta", theta)
            kinds = {found.pop("rope_type", "default"), found.pop("type", "default")}
            if kinds != {"default"} or found.pop("factor", 1) != 1 or found:
                raise ValueError(
                    f"{self.family} config: {name} scales the rotary embedding, which is not "
                    "supported; only null or the default."
                )
        if theta is None:
            raise ValueError(f"{self.family} config: rope_theta must be given.")
        return float(theta)

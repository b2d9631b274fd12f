# SPDX-License-Identifier: Apache-2.0
"""Prompts with images: LLaDA-V's chat template, and ``<image>`` in a text.

vLLM picks a renderer by the tokenizer mode; the tokenizer itself is the ordinary one.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.inputs import TextPrompt, TokensPrompt
from vllm.logger import init_logger
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import TokenizeParams
from vllm.renderers.registry import RENDERER_REGISTRY
from vllm.tokenizers.registry import TokenizerRegistry

from vllm_elastic.engine.image_connector import choose_connector
from vllm_elastic.models.llada_v_config import PLACEHOLDER
from vllm_elastic.models.registry import traits_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.vllm_elastic.engine.image_renderer")

MODE = "llada_v"
CHAT_TEMPLATE = Path(__file__).with_name("llada_v.jinja")


def register_renderer() -> None:
    """Tell vLLM of the mode, once."""
    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, __name__, ImageRenderer.__name__)
        TokenizerRegistry.register(MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")


def render_images(vllm_config: VllmConfig) -> None:
    """Choose the mode for a model that takes images.

    Raises:
        ValueError: the operator chose another tokenizer than the ordinary one.
    """
    model = vllm_config.model_config
    if model.tokenizer_mode not in ("auto", "hf", MODE):
        raise ValueError(
            f"--tokenizer-mode: {model.tokenizer_mode} cannot place images in a prompt; leave it "
            "at auto (vllm_elastic)."
        )
    model.tokenizer_mode = MODE
    choose_connector()


class ImageRenderer(HfRenderer):
    """Hugging Face's tokenizer and templates, with images.

    LLaDA-V tokenises what stands before and after an image apart. A reserved token in place of
    ``<image>`` does the same: no token reaches across it.
    """

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._image_token = ""
        if self.tokenizer is not None:  # a copy of ours
            self._image_token = _image_token(config, self.tokenizer)
            own = self.tokenizer.chat_template
            if own is None or (isinstance(own, str) and "image" not in own):
                self.tokenizer.chat_template = CHAT_TEMPLATE.read_text()
                logger.info("chat messages are written with LLaDA-V's template and system text")

    def get_eos_token_id(self) -> int | None:
        """What ends an answer: the end of turn, as LLaDA-V's sampler never chooses the other."""
        return traits_of(self.model_config.hf_config).end_of_turn_id or super().get_eos_token_id()

    def _tokenize_prompt(self, prompt: TextPrompt, params: TokenizeParams) -> TokensPrompt:
        text = prompt["prompt"]
        if PLACEHOLDER not in text:
            return super()._tokenize_prompt(prompt, params)
        marked = TextPrompt({**prompt, "prompt": text.replace(PLACEHOLDER, self._image_token)})
        tokens = super()._tokenize_prompt(marked, params)
        tokens["prompt"] = text
        return tokens


def _image_token(config: VllmConfig, tokenizer: Any) -> str:
    """The text of the token that stands for an image.

    Raises:
        ValueError: the tokenizer has no such token, or cuts its text up.
    """
    token_id = traits_of(config.model_config.hf_config).image_token_id
    token = tokenizer.convert_ids_to_tokens(token_id)
    if token is None or tokenizer.encode(token, add_special_tokens=False) != [token_id]:
        raise ValueError(
            f"--tokenizer: it has no token of its own for images: id {token_id} is {token!r}. Set "
            "image_token_id in config.json to a reserved token (vllm_elastic)."
        )
    return str(token)

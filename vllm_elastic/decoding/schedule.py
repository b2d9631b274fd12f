# SPDX-License-Identifier: Apache-2.0
"""Which masked positions a step predicts, and which predictions it commits."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from vllm_elastic.config import ElasticConfig
from vllm_elastic.decoding.by_rank import by_rank
from vllm_elastic.decoding.canvas import Canvas, Positions
from vllm_elastic.decoding.commits import make_commit_rule
from vllm_elastic.decoding.dream_steps import DreamSteps
from vllm_elastic.decoding.grammar import Grammar
from vllm_elastic.decoding.predictions import Predictions
from vllm_elastic.decoding.random_numbers import uniform


class Schedule(Protocol):
    """One request's schedule: asked once before each denoising step and once after it."""

    def window(self, canvas: Canvas) -> Positions:
        """The masked positions that the next step predicts, at least one."""
        ...

    def choose(self, canvas: Canvas, predictions: Predictions, step: int) -> npt.NDArray[np.intp]:
        """Indices of the predictions that are committed, ascending; at least one, but for
        ``DreamSteps``, whose number of steps is fixed as well."""
        ...


class SlidingWindow:
    """Elastic-Cache's schedule: the first ``window`` masks; commit by a rule or by rank."""

    def __init__(self, config: ElasticConfig) -> None:
        self._config = config
        self._rule = make_commit_rule(config)

    def window(self, canvas: Canvas) -> Positions:
        return canvas.first_masked(self._config.window)

    def choose(self, canvas: Canvas, predictions: Predictions, step: int) -> npt.NDArray[np.intp]:
        if self._config.tokens_per_step is not None:
            return by_rank(predictions.probabilities, self._config.tokens_per_step)
        return self._rule.choose(predictions)


class TextBlocks(SlidingWindow):
    """Semi-autoregressive: all masks of the first unfinished text block; the same commits."""

    def window(self, canvas: Canvas) -> Positions:
        start, stop = text_block(canvas, self._config.block_length)
        return canvas.first_masked(stop - start, start, stop)


class FixedSteps(TextBlocks):
    """LLaDA's own schedule: a fixed number of denoising steps, shared evenly by the text blocks.

    Each step commits its share of the block's masks, the most probable ones
    (``low_confidence``), or random ones. The first steps of a block take the rest of an uneven
    division, as LLaDA's generation code shares them out.

    Raises:
        ValueError: the answer is no whole number of blocks, or the steps are not shared evenly;
            names the knobs. (LLaDA's code asserts both.)
    """

    def __init__(self, config: ElasticConfig, num_new_tokens: int, seed: int = 0) -> None:
        super().__init__(config)
        assert config.steps is not None
        if config.canvas is not None:
            raise ValueError(
                "'elastic_steps' and 'elastic_canvas' do not go together: leave one out."
            )
        length = config.block_length
        if num_new_tokens % length:
            raise ValueError(
                f"'elastic_block_length' {length} does not divide max_tokens {num_new_tokens}; "
                "with 'elastic_steps' an answer is a whole number of blocks."
            )
        blocks = num_new_tokens // length
        if config.steps % blocks:
            raise ValueError(
                f"'elastic_steps' {config.steps} must be a multiple of the {blocks} blocks that "
                f"max_tokens {num_new_tokens} makes with 'elastic_block_length' {length}."
            )
        self._steps_per_block = config.steps // blocks
        if self._steps_per_block > length:
            raise ValueError(
                f"'elastic_steps' {config.steps} is more than max_tokens {num_new_tokens}: every "
                "step commits a token."
            )
        self._random = config.remasking == "random"
        self._seed = seed

    def choose(self, canvas: Canvas, predictions: Predictions, step: int) -> npt.NDArray[np.intp]:
        share, rest = divmod(self._config.block_length, self._steps_per_block)
        count = share + (step % self._steps_per_block < rest)
        priorities = predictions.probabilities
        if self._random:
            priorities = uniform(self._seed, step, canvas.length)[predictions.positions]
        return by_rank(priorities, count)


class LeftToRight:
    """Another schedule's commits, as far as they follow the text without a gap and a grammar.

    The first masked position is committed at every step: all before it is decided, so the grammar
    has said what it may be. What stands behind it was predicted without knowing it, and the
    grammar has the last word.
    """

    def __init__(self, schedule: Schedule, grammar: Grammar) -> None:
        self._schedule, self._grammar = schedule, grammar

    def window(self, canvas: Canvas) -> Positions:
        return self._schedule.window(canvas)

    def choose(self, canvas: Canvas, predictions: Predictions, step: int) -> npt.NDArray[np.intp]:
        chosen = np.zeros(len(predictions.positions), dtype=np.bool_)
        chosen[self._schedule.choose(canvas, predictions, step)] = True
        chosen[0] = True
        # Nothing behind the first mask is committed yet, so what follows it follows without a gap.
        count = int(np.append(chosen, False).argmin())
        accepted = self._grammar.count_accepted(predictions.token_ids[:count].tolist())
        # One that the grammar refuses after all is vLLM's to refuse.
        return np.arange(max(accepted, 1))


def check_steps(config: ElasticConfig, num_new_tokens: int) -> None:
    """Refuse more denoising steps than tokens: an answer's work is bounded by its length.

    Dream's own schedule would take any number, and commit nothing in most of them.

    Raises:
        ValueError: names the knob.
    """
    if config.steps is not None and config.steps > num_new_tokens:
        raise ValueError(
            f"'elastic_steps' {config.steps} is more than max_tokens {num_new_tokens}, so that "
            "steps would commit nothing; lower it, or raise max_tokens."
        )


def growth_of(config: ElasticConfig, own: int) -> int:
    """Positions that a canvas grows by; 0: it is there as a whole from the start.

    Args:
        own: the model's own, where the knobs name none.

    Raises:
        ValueError: it does not go together with other knobs; names them.
    """
    for knob, value in (("elastic_canvas", config.canvas), ("elastic_alg", config.alg)):
        if value is not None:  # of an answer that is there as a whole
            if config.grow_by:
                raise ValueError(
                    f"'elastic_grow_by' and '{knob}' do not go together: leave one out."
                )
            return 0
    grow_by = own if config.grow_by is None else config.grow_by
    if config.predicts_text_blocks and grow_by % config.block_length:
        raise ValueError(
            f"'elastic_grow_by' {grow_by} must be a multiple of 'elastic_block_length' "
            f"{config.block_length} where text blocks are predicted; change one, or send "
            "elastic_grow_by=0 for an answer that does not grow."
        )
    return grow_by


def text_block(canvas: Canvas, length: int) -> tuple[int, int]:
    """Positions [start, stop) of the first text block with something left to decode."""
    first = int(canvas.first_masked(1)[0])
    start = first - (first - canvas.prompt_length) % length
    return start, min(start + length, canvas.length)


def make_schedule(config: ElasticConfig, num_new_tokens: int, seed: int = 0) -> Schedule:
    """The schedule that a request's knobs name. Raises as ``FixedSteps`` and ``DreamSteps``."""
    if config.alg is not None:
        return DreamSteps(config, num_new_tokens, seed)
    if config.steps is not None:
        return FixedSteps(config, num_new_tokens, seed)
    return TextBlocks(config) if config.predicts_text_blocks else SlidingWindow(config)

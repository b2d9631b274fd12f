# SPDX-License-Identifier: Apache-2.0
"""What becomes of every field of vLLM's ``SamplingParams``: kept, deviating, or refused.

``python -m vllm_elastic.engine.sampling_rules`` prints docs/sampling-parameters.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """One parameter.

    Attributes:
        status: ``kept`` (vLLM's meaning), ``deviates`` or ``refused`` (HTTP 400).
        note: what differs, or why it is refused and what to do instead.
        neutral: of a refused parameter, the values that ask for nothing.
    """

    status: str
    note: str = ""
    neutral: tuple[Any, ...] = ()


_PENALTY = (
    "penalties follow left-to-right writing, a canvas has no such order; leave it at its default."
)
_CAUSAL = (
    "a bidirectional model gives a prompt no probabilities, so tasks that score a given text "
    "(likelihoods, multiple choice) cannot run; leave it out."
)

RULES: dict[str, Rule] = {
    "n": Rule(
        "kept", "each copy with a seed of its own, as in vLLM; more than 1 needs a temperature"
    ),
    "temperature": Rule(
        "deviates",
        "0 is the default; above 0 Gumbel-max in float64 chooses the token of each window "
        "position, as LLaDA's authors do; its probability at temperature 1 decides on the commit "
        "(with `elastic_alg` the tempered one)",
    ),
    "seed": Rule(
        "deviates",
        "random numbers depend on seed, position, denoising step and token only, not on the batch; "
        "-1 is no seed, as in vLLM; a request without one gets the next of the engine's `--seed`",
    ),
    "top_k": Rule("kept"),
    "top_p": Rule("kept"),
    "min_p": Rule("kept"),
    "max_tokens": Rule(
        "deviates", "the canvas: how many masks the model sees from the first step on"
    ),
    "min_tokens": Rule(
        "deviates",
        "no end token is chosen at the first min_tokens positions of the answer; a 400 beside a "
        "grammar, which says itself where an answer ends",
    ),
    "stop": Rule("kept", "looked for in the finished left-to-right prefix"),
    "stop_token_ids": Rule(
        "deviates",
        "once one is committed, masks behind it are dropped; some models have their own beside "
        "them ([models](models.md))",
    ),
    "ignore_eos": Rule(
        "deviates",
        "no end token is chosen, so that all `max_tokens` are text; those in stop_token_ids still "
        "end the answer",
    ),
    "logit_bias": Rule("kept"),
    "allowed_token_ids": Rule("kept"),
    "bad_words": Rule(
        "deviates",
        "words of one token; a longer one is refused, for its tokens are not committed in order",
    ),
    "logprobs": Rule(
        "deviates",
        "of the token when it was committed, with the alternatives of that moment; the mask token "
        "is no alternative",
    ),
    "flat_logprobs": Rule("kept"),
    "logprob_token_ids": Rule("refused", "use logprobs.", (None,)),
    "prompt_logprobs": Rule("refused", _CAUSAL, (None,)),
    "prompt_logprob_token_ids": Rule("refused", _CAUSAL, (None,)),
    "prompt_logprob_start": Rule("refused", _CAUSAL, (None,)),
    "presence_penalty": Rule("refused", _PENALTY, (0.0,)),
    "frequency_penalty": Rule("refused", _PENALTY, (0.0,)),
    "repetition_penalty": Rule("refused", _PENALTY, (1.0,)),
    "repetition_detection": Rule("refused", "leave it out.", (None,)),
    "structured_outputs": Rule(
        "deviates",
        "the answer follows the grammar; its tokens are then committed from left to right, several "
        "a step, and not in the order in which the model is sure of them; a 400 beside what leaves "
        "it no end token ([structured output](serving.md#structured-output))",
    ),
    "thinking_token_budget": Rule("refused", "leave it out.", (None,)),
    "watermarking": Rule("refused", "leave it out or send false.", (None, False)),
    "trace_decode_token_ids": Rule("refused", "leave it out.", (None,)),
    "routed_experts_prompt_start": Rule("refused", "leave it at 0.", (0,)),
    "skip_reading_prefix_cache": Rule("kept", "there is no prefix cache to read"),
    "extra_args": Rule("deviates", "elastic_* keys are ours and checked; others are not ours"),
    "detokenize": Rule("kept"),
    "skip_special_tokens": Rule("kept"),
    "spaces_between_special_tokens": Rule("kept"),
    "include_stop_str_in_output": Rule(
        "kept", "with it an end token is part of text, token_ids, logprobs and usage"
    ),
    "output_kind": Rule("kept"),
    "stream_interval": Rule("kept"),
    "skip_clone": Rule("kept"),
    "output_text_buffer_length": Rule("kept", "vLLM's own"),
}


def table() -> str:
    """The rules as a Markdown page."""
    lines = [
        "# Sampling parameters",
        "",
        "Every field of vLLM's `SamplingParams` with a masked diffusion model. A test holds this",
        "page against the installed vLLM; it is written by "
        "`python -m vllm_elastic.engine.sampling_rules`.",
        "",
        "| parameter | | |",
        "|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {rule.status} | {rule.note.rstrip('.')} |" for name, rule in RULES.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")

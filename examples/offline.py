# SPDX-License-Identifier: Apache-2.0
"""LLaDA through vLLM's `LLM` API; vllm_elastic is found by itself.

python examples/offline.py [--model DIR]
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

TINY_LLADA = Path(__file__).parent / "tiny_llada" / "checkpoint"


def main() -> None:
    """Two chats and a completion."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=str(TINY_LLADA))
    args = parser.parse_args()

    llm = LLM(
        model=args.model,
        # Knobs for all requests; without `additional_config` the preset `block`.
        additional_config={"elastic": {"preset": "block", "window": 32}},
        dtype="float32",
        kv_cache_memory_bytes=256 << 20,  # else vLLM takes most of the free memory
    )

    # `max_tokens` is the canvas: so many masked positions are decoded, in any order, and the
    # answer ends at the first end token. Name it: vLLM's SamplingParams says 16 otherwise.
    greedy = SamplingParams(temperature=0.0, max_tokens=256)
    # One request may differ: this one is decoded without a cache.
    exact = SamplingParams(temperature=0.0, max_tokens=256, extra_args={"elastic_preset": "exact"})

    questions = [
        "Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin",
        "Walk from 3 4 : cow N elf E elm S",
    ]
    chats = [[{"role": "user", "content": question}] for question in questions]
    for question, output in zip(questions, llm.chat(chats, [greedy, exact]), strict=True):
        print(f"\n{question}\n-> {output.outputs[0].text}")

    # As plain text, which has to be what the chat template makes of a question: the model knows no
    # other form.
    chat = [{"role": "user", "content": "Running total modulo 10 : pin 3 elf 1 fig 2"}]
    prompt = llm.get_tokenizer().apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    (output,) = llm.generate(prompt, greedy)
    print(f"\n{output.prompt}\n-> {output.outputs[0].text}")


if __name__ == "__main__":  # vLLM starts its engine in a process that imports this file again
    main()

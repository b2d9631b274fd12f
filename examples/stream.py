# SPDX-License-Identifier: Apache-2.0
"""The OpenAI client against a running server: an answer, streamed.

vllm serve examples/tiny_llada/checkpoint --plugin elastic &
python examples/stream.py [http://localhost:8000/v1] [--prompt TEXT]
"""

import argparse

from openai import OpenAI


def main() -> None:
    """Ask one question and print the answer as it comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base_url", nargs="?", default="http://localhost:8000/v1")
    parser.add_argument(
        "--prompt", default="Table : pin 62 elf 7 fig 91 ash 18 jet 40 . Read fig jet pin"
    )
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="none")
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": args.prompt}],
        max_tokens=256,  # the canvas; 256 is also what the server takes when there is none
        stream=True,
        # Decoding knobs of this request; a name that does not exist is a 400 that lists all.
        extra_body={"vllm_xargs": {"elastic_preset": "block"}},
    )
    # The canvas is filled in any order. What arrives is its finished left-to-right prefix, often
    # several tokens at once.
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""`make demo-image`: a real `vllm serve` answers questions about a picture, then what that costs.

python examples/demo_image.py [--model DIR]
"""

from __future__ import annotations

import base64
import io
import sys
from pathlib import Path
from typing import Any

from demo import Asked, demonstrate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "tiny_llada_v"))

from lessons import CANVAS  # noqa: E402
from measure import request_of  # noqa: E402
from PIL import Image  # noqa: E402
from questions import Problem, problems  # noqa: E402

TINY_LLADA_V = HERE / "tiny_llada_v" / "checkpoint"
SEED = 5  # the model was not trained on these boards
PICTURE = Path("out/demo_image.png")
BLOCKS = 48
"""Columns of the terminal that a picture takes."""


def blocks(image: Image.Image) -> str:
    """A picture in a terminal of 24-bit colour: two pixels a character, one above the other."""
    small = image.convert("RGB").resize((BLOCKS, BLOCKS), Image.Resampling.BOX)
    lines = []
    for y in range(0, BLOCKS, 2):
        line = ""
        for x in range(BLOCKS):
            upper, lower = (small.getpixel((x, y + row)) for row in (0, 1))
            ink, paper = (";".join(map(str, color)) for color in (upper, lower))
            line += f"\x1b[38;2;{ink};48;2;{paper}m▀"
        lines.append(f"  {line}\x1b[0m")
    return "\n".join(lines)


def data_url(image: Image.Image) -> str:
    """A picture as a request carries it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def asked(problem: Problem, number: int) -> Asked:
    """A problem with its picture, which is shown, and written as a file."""
    path = PICTURE.with_stem(f"{PICTURE.stem}_{number}")
    url = {"type": "image_url", "image_url": {"url": data_url(problem.image)}}
    content: list[Any] = [url, {"type": "text", "text": problem.question}]

    def introduce() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        problem.image.save(path)
        print(f"\n{blocks(problem.image)}\n\n  {path}\n")

    return Asked(
        title=problem.kind,
        question=problem.question,
        answer=problem.answer,
        messages=[{"role": "user", "content": content}],
        request=lambda tokenizer: request_of(problem, tokenizer),
        check=problem.check,
        introduce=introduce,
    )


if __name__ == "__main__":
    chosen = [asked(problem, number) for number, problem in enumerate(problems(SEED, 3), start=1)]
    demonstrate(__doc__.splitlines()[0], TINY_LLADA_V, chosen, CANVAS)

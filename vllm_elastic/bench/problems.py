# SPDX-License-Identifier: Apache-2.0
"""Problems with known answers, and how well results answer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_elastic.bench.run import read_jsonl


def read_problems(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """Requests with an ``answer`` each.

    Raises:
        SystemExit: a problem has no answer; names the file.
    """
    problems = list(read_jsonl(path))[:count]
    if any("answer" not in problem for problem in problems):
        raise SystemExit(f"{path}: every problem needs an 'answer'")
    return problems


@dataclass(frozen=True)
class Score:
    """How one policy did on a set of problems.

    Attributes:
        accuracy: share of answers that are exactly right; None where a problem has no answer.
        agreement: share of requests with the same tokens as the baseline; None without one.
        steps: mean denoising steps a request; passes: mean forward passes a request.
        work: row-layers for each answer token, relative to the baseline's; None without one.
        work_per_token: row-layers for each answer token.
        tokens: answer tokens, up to and without the first end token.
    """

    accuracy: float | None
    agreement: float | None
    steps: float
    passes: float
    work: float | None
    work_per_token: float
    tokens: int


def score(
    problems: Sequence[dict[str, Any]],
    results: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]] | None = None,
) -> Score:
    """Score the results of ``problems`` against their answers and a baseline's results.

    Args:
        problems: at least one; ``answer`` is optional.
        results: ``text``, ``token_ids``, ``denoising_steps``, ``passes``, ``row_layers`` of each.
        baseline: results of the same problems.
    """
    count = len(problems)
    tokens = sum(len(r["token_ids"]) for r in results)
    per_token = _row_layers_per_token(results)
    same = work = None
    if baseline is not None:
        pairs = zip(results, baseline, strict=True)
        same = sum(r["token_ids"] == b["token_ids"] for r, b in pairs) / count
        work = per_token / _row_layers_per_token(baseline)
    return Score(
        accuracy=accuracy_of(problems, results),
        agreement=same,
        steps=sum(r["denoising_steps"] for r in results) / count,
        passes=sum(r["passes"] for r in results) / count,
        work=work,
        work_per_token=per_token,
        tokens=tokens,
    )


def _row_layers_per_token(results: Sequence[dict[str, Any]]) -> float:
    tokens = sum(len(r["token_ids"]) for r in results)
    return sum(r["row_layers"] for r in results) / max(tokens, 1)


def accuracy_of(
    problems: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]
) -> float | None:
    """Share of answers that are right; None where a problem has none to compare with."""
    if any("answer" not in problem for problem in problems):
        return None
    right = sum(is_right(p, r) for p, r in zip(problems, results, strict=True))
    return right / len(problems)


def is_right(problem: dict[str, Any], result: dict[str, Any]) -> bool:
    """Exact match of the text, white space folded.

    Raises:
        KeyError: the problem has no answer.
    """
    return result["text"].split() == problem["answer"].split()


def percent(share: float | None, decimals: int = 1) -> str:
    """A share as a table shows it; nothing for None."""
    return "" if share is None else f"{share:.{decimals}%}"

"""How the authors evaluate, and what they report: one recipe for a model and a task.

Source: scripts and tables of Elastic-Cache (VILA-Lab/Elastic-Cache and its project page).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Attributes:
        accuracy: percent; tokens_per_second: of answers, at batch 1 on one A100.
    """

    setting: str
    accuracy: float
    tokens_per_second: float | None = None


@dataclass(frozen=True)
class Recipe:
    """What one run of the harness is given.

    Attributes:
        task: of lm-evaluation-harness.
        metric: of its results, ``name,filter``.
        shots: examples before the question; None: the task's own.
        canvas: masked positions, ``max_tokens``.
        chat: by the chat template, all examples in one user turn; else raw text.
        knobs: ``elastic_*`` of every setting of the run.
        published: what others report for it.
    """

    task: str
    metric: str
    shots: int | None
    canvas: int
    chat: bool = False
    knobs: dict[str, int | float | str] = field(default_factory=dict)
    published: tuple[Published, ...] = ()


_WINDOW: dict[str, int | float | str] = {"elastic_window": 16, "elastic_threshold": 0.9}


def _llada_15(task: str, metric: str, shots: int, *rows: tuple[float, float]) -> Recipe:
    """Raw text, without template, as the released scripts; the authors' corrected table."""
    names = ("no cache", "Fast-dLLM", "Elastic-Cache")
    published = tuple(Published(name, *row) for name, row in zip(names, rows, strict=True))
    return Recipe(task, metric, shots, 512, knobs=_WINDOW, published=published)


def _llada_8b(task: str, metric: str, shots: int, *rows: tuple[float, float]) -> Recipe:
    """The first version's table, whose speeds of GSM8K and MATH its authors took back."""
    names = ("one token a step", "no cache", "Fast-dLLM", "Elastic-Cache")
    published = tuple(Published(name, *row) for name, row in zip(names, rows, strict=True))
    return Recipe(task, metric, shots, 256, chat=True, knobs=_WINDOW, published=published)


_GSM8K = ("gsm8k", "exact_match,flexible-extract", 5)
_MATH = ("minerva_math", "math_verify,none", 4)
_HUMANEVAL = ("humaneval", "pass@1,create_test", 0)
_MBPP = ("mbpp", "pass_at_1,none", 3)

RECIPES: dict[str, dict[str, Recipe]] = {
    "llada-1.5": {
        "gsm8k": _llada_15(*_GSM8K, (81.35, 2.6), (80.82, 36.8), (82.79, 41.7)),
        "minerva_math": _llada_15(*_MATH, (35.63, 5.0), (33.68, 44.4), (35.84, 41.4)),
        "humaneval": _llada_15(*_HUMANEVAL, (40.85, 3.2), (36.59, 15.4), (37.80, 16.8)),
        "mbpp": _llada_15(*_MBPP, (38.20, 1.0), (36.20, 17.8), (39.00, 32.8)),
    },
    "llada-8b-instruct": {
        "gsm8k": _llada_8b(*_GSM8K, (78.01, 7.3), (78.62, 22.8), (77.94, 53.7), (78.24, 58.0)),
        "minerva_math": _llada_8b(
            *_MATH, (33.58, 9.5), (33.28, 25.8), (32.50, 49.0), (33.14, 48.7)
        ),
        "humaneval": _llada_8b(
            *_HUMANEVAL, (40.85, 33.3), (42.07, 102.1), (37.20, 99.8), (40.24, 160.5)
        ),
        "mbpp": _llada_8b(*_MBPP, (29.80, 6.5), (30.00, 23.4), (25.40, 45.1), (32.2, 46.9)),
    },
    # What can be run without a hub: the test model's own tasks.
    "tiny": {
        "tiny": Recipe("tiny_llada", "exact_match,strip", None, 256, chat=True),
    },
}
"""By model, then by task."""

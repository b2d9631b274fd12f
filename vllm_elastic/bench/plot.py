# SPDX-License-Identifier: Apache-2.0
"""``bench plot``: a picture of what another benchmark wrote with ``--json``."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def add_parser(commands: Any) -> None:
    """Add ``plot`` to the command line."""
    parser = commands.add_parser(
        "plot",
        help="a picture of what settings, compare, card or drift wrote with --json",
        description="Draws accuracy against work (settings), tokens per second (compare), where a "
        "pass's time goes (card --parts) or drift by layer (drift); which one, the file says. "
        "Needs matplotlib.",
    )
    parser.add_argument("file", type=Path, help="what --json wrote")
    parser.add_argument("--out", type=_picture, required=True, metavar="FILE", help=".svg or .png")
    parser.add_argument("--title", default=None)
    parser.set_defaults(function=main)


def _picture(text: str) -> Path:
    if not text.endswith((".svg", ".png")):
        raise argparse.ArgumentTypeError(f"must end in .svg or .png, got {text!r}")
    return Path(text)


def main(args: argparse.Namespace) -> None:
    """Choose the picture by what the rows hold."""
    try:
        rows: Any = json.loads(args.file.read_text())
    except ValueError:
        rows = []
    if isinstance(rows, dict):
        rows = rows.get("passes")
    draw = picture_of(rows)
    if draw is None:
        raise SystemExit(f"{args.file}: not the --json of settings, compare, card --parts or drift")
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    # The same bytes for the same figures, so that a picture in git changes only with them.
    matplotlib.rcParams["svg.hashsalt"] = "vllm_elastic"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    draw(axes, rows)
    if args.title:
        axes.set_title(args.title)
    axes.spines[["top", "right"]].set_visible(False)
    metadata = {"Date": None} if args.out.suffix == ".svg" else None
    figure.savefig(args.out, dpi=150, metadata=metadata)
    plt.close(figure)


def picture_of(rows: Any) -> Callable[[Any, Rows], None] | None:
    """The function that draws such rows, by the keys of the first."""
    pictures: dict[str, Callable[[Any, Rows], None]] = {
        "by_task": accuracy_and_work,
        "tokens_per_second": speed,
        "shares": parts_of_a_pass,
        "region": drift_by_layer,
    }
    if not isinstance(rows, list) or not rows or not isinstance(rows[0], dict):
        return None
    return next((draw for key, draw in pictures.items() if key in rows[0]), None)


def accuracy_and_work(axes: Any, rows: Rows) -> None:
    """A point a row of ``settings``; rows that differ in the drift bound only are joined."""
    lines: dict[str, Rows] = {}
    for row in rows:
        line = re.sub(r", (gamma|block_drift) [\d.]+", "", row["policy"])
        lines.setdefault(line, []).append(row)
    for (name, points), marker in zip(lines.items(), cycle("osD^vP*X"), strict=False):
        points = sorted(points, key=lambda row: row["work"])
        work, accuracy = ([row[key] for row in points] for key in ("work", "accuracy"))
        axes.plot(work, [100 * a for a in accuracy], marker=marker, label=name)
    axes.set_xscale("log")
    axes.set_xlabel("row-layers for each answer token, relative to none")
    axes.set_ylabel("exact match, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def speed(axes: Any, rows: Rows) -> None:
    """Bars of ``compare``: a group for each policy, a bar for each prompt length and batch size."""
    settings = sorted({_setting(row) for row in rows})
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    width = 0.8 / len(settings)
    for place, setting in enumerate(settings):
        found = {
            row["policy"]: row["tokens_per_second"] for row in rows if _setting(row) == setting
        }
        at = [policies.index(policy) + (place + 0.5) * width - 0.4 for policy in found]
        batch, _, canvas = setting
        prompt = next(row["prompt_tokens"] for row in rows if _setting(row) == setting)
        label = f"batch {batch}, canvas {canvas}, prompts of {prompt}"
        bars = axes.bar(at, list(found.values()), width, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.set_xticks(range(len(policies)), policies, rotation=20, ha="right")
    axes.set_ylabel("answer tokens a second")
    axes.grid(alpha=0.3, axis="y")
    axes.legend(fontsize=8)


def _setting(row: dict[str, Any]) -> tuple[int, bool, int]:
    """Batch size, whether the prompt is longer than the canvas, canvas."""
    return row["batch_size"], row["prompt_tokens"] > row["gen_length"], row["gen_length"]


def parts_of_a_pass(axes: Any, rows: Rows) -> None:
    """Stacked bars of ``card``: multiples of the floor, by where the time goes."""
    names = [f"{row['pass']}, {row['canvas']} x {row['batch_size']}" for row in rows]
    bottom = [0.0] * len(rows)
    for part in rows[0]["shares"]:
        heights = [_step_to_floor(row) * row["shares"][part] for row in rows]
        axes.bar(names, heights, 0.7, bottom=bottom, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--")
    axes.set_ylabel("multiples of the floor")
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.legend(fontsize=8)


def _step_to_floor(row: dict[str, Any]) -> float:
    """A step's time relative to the floor: the pass, and what the host adds."""
    step = row["milliseconds"] + row["gap_milliseconds"]
    return float(row["times_floor"] * step / row["milliseconds"])


def drift_by_layer(axes: Any, rows: Rows) -> None:
    """Lines of ``drift``: relative change in one step, by distance from the nearest commit."""
    wanted = [row for row in rows if row["quantity"] == "near"]
    regions = sorted({row["region"] for row in wanted}, key=int)
    for region in regions:
        points = sorted((row["layer"], row["value"]) for row in wanted if row["region"] == region)
        axes.plot(
            [p[0] for p in points], [p[1] for p in points], marker="o", label=f"up to {region}"
        )
    axes.set_xlabel("layer")
    axes.set_ylabel("relative change of its input in one step")
    axes.grid(alpha=0.3)
    axes.legend(
        title="distance from a\nnew token", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1)
    )

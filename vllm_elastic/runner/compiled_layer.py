# SPDX-License-Identifier: Apache-2.0
"""A layer as one compiled function: the same one for all layers and all numbers of rows, on CPUs.

torch.compile takes the tensors that a function reads for inputs, a layer's weights among them, and
all else for constants. To check at every call whether the constants still hold takes as long as
compiling saves, so it is checked once: every layer against itself as it is written, bit for bit.
Attention depends on the batch; it is an operator that Python runs as it is written
(``LayerAttention``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm

from vllm_elastic.models.layer_pass import Layer, LayerAsWritten, LayerAttention, NoCache, leading
from vllm_elastic.models.layers import PreNormBlock
from vllm_elastic.models.rows import AttentionCall, CandidateRows, LayerRows

_OPERATORS = torch.library.Library("vllm_elastic", "DEF")
_OPERATORS.define("attend(Tensor q, Tensor k, Tensor v, Tensor(a!) attended) -> ()")

_PROJECTED, _FINISHED = 48, 40
"""Numbers of rows that are compiled with; the compiler takes equal ones for one."""


class _Current:
    """What the operator works on: it takes tensors only. Nothing between two calls, so that what a
    pass recorded does not outlive it."""

    attention: LayerAttention | None = None


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attended: torch.Tensor) -> None:
    attention, count = _Current.attention, attended.shape[0]
    assert attention is not None, "called outside of a CompiledLayer"
    attention.record(q)
    attention.write(k, v)
    q = attention.finished(q)
    attention.attend(leading(q, count), leading(k, count), leading(v, count), attended)


_OPERATORS.impl("attend", _attend, "CPU")
_OPERATORS.impl("attend", lambda q, k, v, attended: None, "Meta")


def _layer(
    block: PreNormBlock, projected: torch.Tensor, positions: torch.Tensor, finished: torch.Tensor
) -> torch.Tensor:
    """The output [R, d] of a layer.

    Args:
        projected: [P, d], its input; positions: int64 [P].
        finished: int64 [R], rows of it that are finished.
    """
    q, k, v = block.project(projected, positions)
    attended = block.attention_buffer(q.new_empty(finished.shape[0], *q.shape[1:]))
    torch.ops.vllm_elastic.attend(q, k, v, attended)
    return block.finish(projected[finished], attended.flatten(1))


class CompiledLayer:
    """One layer by the compiled function (``models.layer_pass.Layer``).

    Invariant: its rows are one call and have no adapters.
    """

    def __init__(
        self, compiled: Callable[..., torch.Tensor], block: PreNormBlock, all_rows: torch.Tensor
    ) -> None:
        self._compiled, self._block, self._all_rows = compiled, block, all_rows

    def __call__(
        self, x: torch.Tensor, projected: torch.Tensor, attention: LayerAttention
    ) -> torch.Tensor:
        positions = leading(attention.rows.positions, projected.shape[0])
        if attention.window is None:
            finished = self._all_rows[: x.shape[0]]
        else:
            finished = attention.window.rows
        _Current.attention = attention
        try:
            # What fills up is taken from `projected` too: other rows than x has, of no meaning.
            return self._compiled(self._block, projected, positions, finished)
        finally:
            _Current.attention = None


class _Written(NoCache):
    """Keeps what would be written."""

    written: tuple[torch.Tensor, torch.Tensor]

    def write(self, k: torch.Tensor, v: torch.Tensor) -> None:
        self.written = k.clone(), v.clone()


def compile_layers(model: Any, most_rows: int) -> list[Layer]:
    """Compile one of the layers, which takes seconds, and check all of them.

    Args:
        model: a ``DiffusionTransformer`` on a CPU.
        most_rows: R at most.

    Raises:
        RuntimeError: a layer's numbers are others than as it is written.
        Exception: there is no C++ compiler, or it cannot compile this.
    """
    weight = model.embed_tokens.weight
    all_rows = torch.arange(max(most_rows, _PROJECTED), device=weight.device)
    x = torch.randn(
        _PROJECTED,
        model.width,
        generator=torch.Generator(weight.device).manual_seed(0),
        dtype=weight.dtype,
        device=weight.device,
    )
    rows, window = _rows(all_rows[:_PROJECTED].clone()), _window(all_rows[:_FINISHED].clone())
    with model.pass_context():
        compiled = _compile(model.blocks[0], x, rows.positions, window.rows)
        layers = [CompiledLayer(compiled, block, all_rows) for block in model.blocks]
        for number, (layer, block) in enumerate(zip(layers, model.blocks, strict=True)):
            for kept in (window, None):
                attention = _Written(number, block.attn, rows, kept, None)
                _refuse_another(layer, LayerAsWritten(block), x, attention)
    return [*layers]


def _refuse_another(layer: Layer, written: Layer, x: torch.Tensor, attention: _Written) -> None:
    compiled, expected = (
        (way(x.clone(), x, attention), *attention.written) for way in (layer, written)
    )
    if not all(map(torch.equal, compiled, expected)):
        raise RuntimeError(f"the numbers of layer {attention.layer} would change")


def _compile(
    block: PreNormBlock, x: torch.Tensor, positions: torch.Tensor, finished: torch.Tensor
) -> Callable[..., torch.Tensor]:
    """``_layer`` for any block and numbers of rows; arguments as its own."""
    for tensor in (x, positions, finished):
        torch._dynamo.mark_dynamic(tensor, 0)
    options = {
        "guard_filter_fn": lambda guards: [False for _ in guards],
        # Else what is fused is not rounded in between, and bfloat16 gives other numbers.
        "emulate_precision_casts": True,
        # A product and a sum would become one operator, which does not round in between either.
        "pattern_matcher": False,
    }
    with tqdm(total=1, desc="Compiling a layer") as bar:
        traced: Any = torch.compile(_layer, dynamic=False, fullgraph=True, options=options)
        # Ahead of time: what torch.compile does before each call is a tenth of a window's layer.
        compiled = traced.aot_compile(((block, x, positions, finished), {}))
        compiled.disable_guard_check()
        bar.update()
    called: Callable[..., torch.Tensor] = compiled
    return called


def _rows(positions: torch.Tensor) -> LayerRows:
    count = len(positions)
    return LayerRows(
        num_rows=count,
        num_finished=count,
        positions=positions,
        slots=positions,
        num_queries=0,
        calls=[AttentionCall(0, count)],
    )


def _window(rows: torch.Tensor) -> CandidateRows:
    return CandidateRows(rows=rows, calls=[AttentionCall(0, len(rows))])

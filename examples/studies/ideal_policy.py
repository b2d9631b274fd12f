# SPDX-License-Identifier: Apache-2.0
"""A refresh policy that knows the true drift of every position: a yardstick for those that guess.

Before each denoising step but the first, a *shadow pass* recomputes the whole canvas. It is not
counted as work and nothing of it is stored: it only tells the truth. The policy then picks the
rows that the step computes over its own cache, so that the answers it is judged by were decoded
from what that cache holds, errors included.

* The drift of a position at layer l is ``|true - stored| / |true|`` of the hidden state at that
  layer's input. (The keys and values stored at layer l were computed from that stored state.)
* Its cost is its drift times the share of the window's attention that it gets in the same layer
  (mean over heads and window rows, in the shadow pass), in the layer where this is largest. The
  sum of the costs of what a step does not compute bounds, to first order, how wrong the window's
  attention output is in any layer. This is the error of which ``tolerance`` is left.
* *Mandatory* rows are computed from layer 0 at every step: the window, what was just committed and,
  with a ``reach``, the positions up to so far from that.
* If the others' costs exceed ``tolerance``, the costliest of them are refreshed, by cost for each
  layer to be computed, as many as leave ``tolerance`` at most. With a ``granularity`` above 1 the
  choice is among blocks of so many positions, which are refreshed whole: a block's cost is the
  sum of its positions' costs, its drift their mean, weighed by attention.
* A refreshed row joins, from the stored state, at the last layer up to which its drift is at most
  ``slack`` times its largest.

With ``mandatory`` "committed" the window's rows are chosen as well. A window row whose output of
the last layer (what is predicted from) has drifted by more than ``prediction_drift`` is computed,
from the last layer whose stored input is good, as for a refreshed row. Every other one is a
position like those outside, refreshed if its cost is in the way, and its prediction stays in
the running as it was last computed.

What is ideal about it is the knowledge, at no cost, of now. It is no lower bound on the work: it
does not know what later steps will need, it looks no further than the window's own attention (a
stale position that only other stale ones attend to costs nothing until it is attended), and a
refreshed row is computed over neighbours that may be stale themselves. It shows what a policy that
chooses rows by attention times drift would reach if its estimates were right, and with a ``reach``
one that, as ``elastic-block`` does, computes the neighbours of every commit whatever they cost by
that measure, which takes much less work (docs/drift.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vllm_elastic.reference.canvas import Canvas
from vllm_elastic.reference.decoding import DecodingOptions, commit_predictions
from vllm_elastic.reference.layer_cache import LayerCache
from vllm_elastic.reference.llada import LLaDA
from vllm_elastic.reference.result import DecodingResult


@dataclass(frozen=True)
class IdealOptions(DecodingOptions):
    """``DecodingOptions`` and the policy's own; see above. All numbers are shares, except for
    ``granularity`` and ``reach``, which are positions.

    Raises:
        ValueError: a knob is out of range.
    """

    tolerance: float = 0.03
    slack: float = 0.1
    granularity: int = 1
    reach: int = 0
    mandatory: Literal["window", "committed"] = "window"
    prediction_drift: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mandatory not in ("window", "committed"):
            raise ValueError(f"mandatory is {self.mandatory!r}, must be 'window' or 'committed'")
        if self.granularity < 1:
            raise ValueError(f"granularity is {self.granularity}, must be at least 1")
        for name in ("tolerance", "slack", "prediction_drift", "reach"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0")


@dataclass
class Truth:
    """A pass over everything.

    Attributes:
        states: (L + 1, T, d) each layer's input and, at the end, the last one's output.
        attention: (L, T) share of the window's attention, mean over heads and window rows.
    """

    states: Tensor
    attention: Tensor


class ShadowPasses:
    """The truth of every canvas asked for, each computed once; ``keep`` of them are kept.

    One prompt decoded with several tolerances goes through mostly the same canvases. All of its
    decodings must have the same window size, as the attention is the window's.
    """

    def __init__(self, model: LLaDA, keep: int = 256) -> None:
        if model.config.logits_shift:
            raise ValueError("the ideal policy reads a position's logits from its own row only")
        self.model, self.keep = model, keep
        self._known: dict[bytes, Truth] = {}

    def of(self, canvas: Canvas, window: Tensor) -> Truth:
        """``window``: (W,) positions."""
        key = canvas.tokens.cpu().numpy().tobytes()
        if key not in self._known:
            if len(self._known) >= self.keep:
                del self._known[next(iter(self._known))]
            self._known[key] = self._run(canvas, window)
        return self._known[key]

    def _run(self, canvas: Canvas, window: Tensor) -> Truth:
        model = self.model
        states, attention = [model.embed(canvas.tokens)], []
        for layer in range(model.config.n_layers):
            q, k, v = model.project(layer, states[-1], canvas.everywhere)
            attention.append(model.attention_rows(q[:, window], k).mean(dim=(0, 1)))
            states.append(model.finish(layer, states[-1], model.attend(q, k, v)))
        return Truth(torch.stack(states), torch.stack(attention))


@dataclass
class Work:
    """Row-layers of one request by what they are for; ``floor`` is the least with this window.

    The floor has the first pass and, of every later step, the window and what was just committed
    in all layers, at the steps that this decoding took.
    """

    first: int = 0
    window: int = 0
    committed: int = 0
    neighbours: int = 0
    refreshed: int = 0
    floor: int = 0


@dataclass
class IdealResult(DecodingResult):
    """``DecodingResult``, and what its ``row_layers`` were for."""

    work: Work = field(default_factory=Work)


def relative_drift(true: Tensor, stored: Tensor) -> Tensor:
    """(..., T) relative change of (..., T, d) hidden states."""
    return (true - stored).norm(dim=-1) / true.norm(dim=-1)


def last_good_layer(drift: Tensor, slack: float) -> Tensor:
    """(n,) int64: the last layer up to which (layers, n) drift is within ``slack`` of its largest.

    Layer 0 if even its input (the token) has changed, or if nothing has.
    """
    moved = drift > slack * drift.max(dim=0).values
    return (moved.int().argmax(dim=0) - 1).clamp(min=0)


def costliest(cost: Tensor, price: Tensor, tolerance: float) -> Tensor:
    """Indices to take so that the (n,) costs of all others add up to ``tolerance`` at most.

    Those first that take most cost away for their (n,) price; ones without a cost never.
    """
    order = (cost / price).argsort(descending=True, stable=True)
    not_before = cost[order].double().flip(0).cumsum(0).flip(0)  # what is left if we stop here
    return order[not_before > tolerance]


def refreshed_joins(
    drift: Tensor, attention: Tensor, free: Tensor, options: IdealOptions
) -> Tensor:
    """(T,) int64: where the refreshed positions join; L for those that are left alone.

    Args:
        drift: (L, T) of each layer's stored input.
        attention: (L, T) share of the window's attention.
        free: (T,) bool, positions to choose among.
    """
    layers, length = drift.shape
    blocks = torch.arange(length) // options.granularity  # (T,) block of each position
    count = int(blocks[-1]) + 1

    def by_block(values: Tensor) -> Tensor:
        """(..., T) -> (..., blocks), summed over the free positions."""
        total = values.new_zeros(*values.shape[:-1], count)
        return total.index_add_(-1, blocks, values * free)

    cost = by_block((drift * attention).max(dim=0).values)
    weight = attention.mean(dim=0)
    block_drift = by_block(drift * weight) / by_block(weight).clamp(min=1e-30)
    join = last_good_layer(block_drift, options.slack)
    price = (by_block(torch.ones(length)) * (layers - join)).clamp(min=1)
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[costliest(cost, price, options.tolerance)] = True
    return torch.where(chosen[blocks] & free, join[blocks], layers)


class Ideal:
    """One request being decoded; ``step`` runs one denoising step.

    Attributes:
        cache: keys, values and inputs of each layer, as the policy's own passes left them.
        outputs: (T, d) output of the last layer, as last computed.
        committed: (n,) positions that the last step committed.
        neighbours: (m,) positions within ``reach`` of one of these, itself among them.
    """

    def __init__(
        self, model: LLaDA, canvas: Canvas, options: IdealOptions, shadow: ShadowPasses
    ) -> None:
        self.model, self.canvas, self.options, self.shadow = model, canvas, options, shadow
        self.layers = model.config.n_layers
        self.cache = LayerCache(model, len(canvas))
        self.outputs = self.cache.hidden.new_full(self.cache.hidden.shape[1:], torch.nan)
        self.committed = self.neighbours = canvas.everywhere[:0]
        self.result = IdealResult()

    def joins(self, window: Tensor) -> Tensor:
        """(T,) int64: where each position joins the coming step; L: not at all."""
        options, length = self.options, len(self.canvas)
        if self.result.denoising_steps == 0:
            return torch.zeros(length, dtype=torch.int64)
        truth = self.shadow.of(self.canvas, window)
        drift = relative_drift(truth.states[:-1], self.cache.hidden)  # (L, T)
        join = torch.full((length,), self.layers)
        join[self.neighbours] = 0  # with what was just committed
        if options.mandatory == "window":
            join[window] = 0
        else:
            output = relative_drift(truth.states[-1, window], self.outputs[window])  # (W,)
            profile = torch.cat([drift[:, window], output[None]])  # (L + 1, W)
            at = last_good_layer(profile, options.slack)
            chosen = torch.where(output > options.prediction_drift, at, self.layers)
            join[window] = torch.minimum(join[window], chosen)
        refreshed = refreshed_joins(drift, truth.attention, join == self.layers, options)
        return torch.minimum(join, refreshed)

    def run(self, join: Tensor) -> None:
        """All layers for the positions that ``join`` (T,) below L, over what is stored."""
        model, cache = self.model, self.cache
        stream = model.embed(self.canvas.tokens)  # (T, d), right where a row is under way
        for layer in range(self.layers):
            joining = join == layer
            if layer > 0:
                stream[joining] = cache.hidden[layer, joining]
            rows = (join <= layer).nonzero().flatten()
            q, k, v = model.project(layer, stream[rows], rows)
            cache.write(layer, rows, stream[rows], k, v)
            attended = model.attend(q, cache.keys[layer], cache.values[layer])
            stream[rows] = model.finish(layer, stream[rows], attended)
        computed = join < self.layers
        self.outputs[computed] = stream[computed]

    def count(self, join: Tensor, window: Tensor) -> None:
        """Add the step's row-layers to what they were for."""
        work, spent = self.result.work, self.layers - join  # (T,) row-layers
        if self.result.denoising_steps == 0:
            work.first = int(spent.sum())
            work.floor = work.first
            return
        work.window += int(spent[window].sum())
        work.committed += int(spent[self.committed].sum())
        spent[window] = spent[self.committed] = 0
        work.neighbours += int(spent[self.neighbours].sum())
        spent[self.neighbours] = 0
        work.refreshed += int(spent.sum())
        work.floor += self.layers * (len(window) + len(self.committed))

    def step(self) -> bool:
        """One denoising step; False, without one, if no position is open."""
        window = self.canvas.window(self.options.window)
        if len(window) == 0:
            return False
        join = self.joins(window)
        self.run(join)
        self.count(join, window)
        committed = commit_predictions(
            self.model, self.canvas, window, self.outputs[window], self.options, self.result
        )
        self.result.record(
            [
                (
                    "refresh" if self.result.denoising_steps else "first",
                    0,
                    int((join < self.layers).sum()),
                )
            ],
            committed.tolist(),
            self.layers,
            len(self.canvas),
            row_layers=int((self.layers - join).sum()),
        )
        self.committed = committed
        distance = (self.canvas.everywhere[:, None] - committed[None]).abs()  # (T, n)
        self.neighbours = (distance <= self.options.reach).any(dim=1).nonzero().flatten()
        return True


def ideal(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: IdealOptions | None = None,
    shadow: ShadowPasses | None = None,
) -> IdealResult:
    """Decode a request with the ideal policy.

    Args:
        shadow: of this prompt and window size, to share the shadow passes of several decodings.

    Raises:
        ValueError: see ``Canvas``.
    """
    options = options or IdealOptions()
    canvas = Canvas(model, prompt_ids, max_tokens, options.drop_after_every_eos)
    decoder = Ideal(model, canvas, options, shadow or ShadowPasses(model))
    while decoder.step():
        pass
    decoder.result.finish(canvas)
    return decoder.result


def without_cache(
    model: LLaDA,
    prompt_ids: Sequence[int],
    max_tokens: int,
    options: DecodingOptions,
    shadow: ShadowPasses,
) -> DecodingResult:
    """``decode``, by way of the shadow passes, which others of this prompt then need not repeat."""
    canvas = Canvas(model, prompt_ids, max_tokens, options.drop_after_every_eos)
    result = DecodingResult()
    while len(window := canvas.window(options.window)):
        hidden = shadow.of(canvas, window).states[-1, window]
        committed = commit_predictions(model, canvas, window, hidden, options, result)
        kind = "full" if result.denoising_steps else "first"
        result.record(
            [(kind, 0, len(canvas))], committed.tolist(), model.config.n_layers, len(canvas)
        )
    return result.finish(canvas)

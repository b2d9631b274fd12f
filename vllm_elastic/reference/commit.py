# SPDX-License-Identifier: Apache-2.0
"""Which predictions become final in a denoising step. Temperature 0."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["threshold", "frontier", "steady", "credit", "factor", "frechet", "local", "entropy"]


def without(logits: Tensor, token_ids: Sequence[int]) -> Tensor:
    """(R, vocabulary) in float64, tokens that are no candidates at -inf; some may lie beyond."""
    excluded = [token for token in token_ids if token < logits.shape[1]]
    return logits.double().index_fill(
        1, torch.tensor(excluded, dtype=torch.int64, device=logits.device), -torch.inf
    )


def candidates(
    logits: Tensor,
    mask_token_id: int,
    never: Sequence[int] = (),
    unconfident: Sequence[int] = (),
) -> tuple[Tensor, Tensor]:
    """The most probable token of every row and its probability.

    Softmax in float64, as Elastic-Cache's released code has it (LLaDA's has had float64 and, since,
    the logits' own dtype). One addition of ours: the mask token is no candidate (probability 0),
    since committing it would decode nothing.

    Args:
        logits: (R, vocabulary), any float dtype.
        mask_token_id: may lie beyond the vocabulary.
        never: token ids that are no candidates (LLaDA's ``logits_eos_inf``: the end of text).
        unconfident: token ids that may be predicted, and whose logits are -inf in the softmax: such
            a prediction has confidence 0, and the others have their share of what is left
            (LLaDA's ``confidence_eos_eot_inf``: the ends of text and of turn).

    Returns:
        (R,) int64 token ids, equal logits going to the smaller id; (R,) float64 confidences.
    """
    logits = without(logits, (mask_token_id, *never))
    token_ids = logits.argmax(dim=-1)
    probabilities = without(logits, unconfident).softmax(dim=-1)
    return token_ids, probabilities.gather(1, token_ids[:, None]).squeeze(1)


@dataclass(frozen=True)
class CommitOptions:
    """Which predictions of a step are committed, whatever is cached.

    Attributes:
        commit: the rule, see ``sure``.
        threshold: epsilon, confidence from which a prediction is sure; above 1: one token a step
            (more only if equally confident).
        frontier_threshold, steady_threshold, credit_decay, credit_weight, factor, frechet_margin,
            relaxed_threshold, anchor_radius, entropy_bound: of the other rules.
        tokens_per_step: commit this many, the most confident, whatever the rule.
        drop_after_every_eos, grow_by, grow_ahead: see ``Canvas``.
        never, unconfident: token ids, see ``candidates``.
        grammar: the token ids that may follow an answer so far; none after its last one.
            See ``decoding.commit_predictions``.
    """

    commit: Rule = "threshold"
    threshold: float = 0.9
    frontier_threshold: float = 0.5
    steady_threshold: float = 0.8
    credit_decay: float = 0.8
    credit_weight: float = 0.7
    factor: float = 0.75
    frechet_margin: float = 0.25
    relaxed_threshold: float = 0.75
    anchor_radius: int = 4
    entropy_bound: float = 0.1
    tokens_per_step: int | None = None
    drop_after_every_eos: bool = True
    grow_by: int = 0
    grow_ahead: int = 0
    never: tuple[int, ...] = ()
    unconfident: tuple[int, ...] = ()
    grammar: Callable[[list[int]], Collection[int]] | None = None

    def __post_init__(self) -> None:
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise ValueError(f"tokens_per_step is {self.tokens_per_step}, must be at least 1")
        if self.commit not in get_args(Rule):
            raise ValueError(f"commit is {self.commit!r}, must be one of {get_args(Rule)}")

    @property
    def of_canvas(self) -> tuple[bool, int, int]:
        """What ``Canvas`` is told of these."""
        return self.drop_after_every_eos, self.grow_by, self.grow_ahead


def entropies(logits: Tensor, mask_token_id: int, never: Sequence[int] = ()) -> Tensor:
    """(R,) float64 in nats, of the distributions that ``candidates`` takes its tokens from."""
    probabilities = without(logits, (mask_token_id, *never)).softmax(dim=-1)
    return -torch.xlogy(probabilities, probabilities).sum(dim=-1)


@dataclass(frozen=True)
class Evidence:
    """What a rule may want besides the confidence of n predictions, (n,) each.

    Attributes:
        entropy: of the predictions' distributions; ``entropy`` alone needs it.
        lasting: the lower of the confidences at this and the step before, if that predicted the
            same token there; 0 if not. ``steady`` alone needs it.
    """

    entropy: Tensor | None = None
    lasting: Tensor | None = None


NO_EVIDENCE = Evidence()


def sure(
    confidence: Tensor,
    positions: Tensor,
    options: CommitOptions,
    evidence: Evidence = NO_EVIDENCE,
) -> Tensor:
    """(n,) bool: what may be committed together; perhaps nothing. A confidence of 0 never is.

    With c_1 >= c_2 >= ... the confidences in falling order, equals by position, and h_1, h_2, ...
    the entropies in the same order:

    * ``threshold`` (Elastic-Cache, step 6): every c of at least ``threshold``.
    * ``frontier``: every c of at least ``threshold``, and that of the leftmost position if it is
      at least ``frontier_threshold``.
    * ``steady``: what ``frontier`` commits, and every prediction that lasts (see ``Evidence``)
      with at least ``steady_threshold``.
    * ``credit`` (CreditDecoding): as ``threshold``; the confidences are those that
      ``DecodingResult.credited`` makes of the model's.
    * ``factor`` (Fast-dLLM): the first n, n the largest with (n + 1) (1 - c_n) < ``factor``.
    * ``frechet`` (Fast-dLLM++): the first n, n the largest with
      max(0, c_1 + ... + c_n - (n - 1)) - (1 - c_n) > ``frechet_margin``.
    * ``local`` (LocalLeap): every c of at least ``threshold``, an anchor, and every c of at least
      ``relaxed_threshold`` at most ``anchor_radius`` positions from an anchor.
    * ``entropy`` (EB-Sampler): the first n, n the largest with
      h_1 + ... + h_n - max(h_1, ..., h_n) <= ``entropy_bound``; a single one only if its own is.

    Args:
        confidence: (n,) of the predictions for ``positions`` (n,), ascending.
    """
    if options.commit in ("threshold", "credit"):
        chosen = confidence >= options.threshold
    elif options.commit in ("frontier", "steady"):
        needed = torch.full_like(confidence, options.threshold)
        needed[positions.argmin()] = min(options.threshold, options.frontier_threshold)
        chosen = confidence >= needed
        if options.commit == "steady":
            assert evidence.lasting is not None
            chosen = chosen | (evidence.lasting >= options.steady_threshold)
    elif options.commit == "local":
        relaxed = confidence >= options.relaxed_threshold
        chosen = confidence >= options.threshold
        chosen = chosen | relaxed & near_anchors(confidence, positions, options)
    else:
        count = 0
        for n, room in enumerate(rooms(confidence, options, evidence.entropy), start=1):
            if room > 0 or (room == 0 and options.commit == "entropy"):
                count = n
        chosen = most_confident(confidence, count)
    return chosen & (confidence > 0)


def rooms(confidence: Tensor, options: CommitOptions, entropy: Tensor | None = None) -> list[float]:
    """For n = 1, 2, ...: how far the n most confident are within the rule's bound; below 0: not."""
    order = confidence.argsort(descending=True, stable=True)
    falling = confidence[order].tolist()
    found = []
    for n in range(1, len(falling) + 1):
        if options.commit == "factor":
            found.append(options.factor - (n + 1) * (1 - falling[n - 1]))
        elif options.commit == "frechet":
            together = max(0.0, sum(falling[:n]) - (n - 1))
            found.append(together - (1 - falling[n - 1]) - options.frechet_margin)
        else:
            assert entropy is not None
            first = entropy[order[:n]].tolist()
            shared = sum(first) - max(first) if n > 1 else first[0]
            found.append(options.entropy_bound - shared)
    return found


def near_anchors(confidence: Tensor, positions: Tensor, options: CommitOptions) -> Tensor:
    """(n,) bool: within ``anchor_radius`` of a confidence of at least ``threshold``."""
    near = torch.zeros_like(confidence, dtype=torch.bool)
    for anchor in positions[confidence >= options.threshold]:
        near |= (positions - anchor).abs() <= options.anchor_radius
    return near


def most_confident(confidence: Tensor, count: int) -> Tensor:
    """(n,) bool: the ``count`` highest, all if there are fewer; equals go to the earlier one."""
    chosen = torch.zeros_like(confidence, dtype=torch.bool)
    chosen[confidence.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def choose(
    confidence: Tensor,
    positions: Tensor,
    options: CommitOptions,
    evidence: Evidence = NO_EVIDENCE,
) -> Tensor:
    """(n,) bool, which of the window to commit: a fixed number a step, or what is ``sure``.

    If nothing is, the best and those equal to it are. If all confidences are 0 the earliest is:
    LLaDA's code, which commits a fixed number a step, has no rule for this case.
    """
    if options.tokens_per_step is not None:
        return most_confident(confidence, options.tokens_per_step)
    chosen = sure(confidence, positions, options, evidence)
    if chosen.any():
        return chosen
    if confidence.max() > 0:
        return confidence == confidence.max()
    return most_confident(confidence, 1)

# SPDX-License-Identifier: Apache-2.0
"""A prediction and its probability for each window row."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner.counter_random import uniform

_NUMBERS_AT_ONCE = (1 << 25, 1 << 17)
"""Numbers of 8 bytes that are made of logits at a time: on a GPU a quarter of a GiB (``bench plan``
counts on it), on a CPU what a core's own cache holds (1 MB)."""

_COPIES_OF_SAMPLED = 6
"""Such numbers for each logit of a row that is sampled: with top_p 46 bytes."""

_COPIES_OF_ENTROPIES = 2
"""Such numbers for each logit of a row whose entropy is reported: 16 bytes."""

_COPIES_OF_LOGPROBS = (2, 4)
"""Such numbers for each logit of a row with log probabilities: 13 bytes; of all tokens, 28."""

_FEW_ALTERNATIVES = 32
"""To a token, whose log probabilities wait on the device until the pass's one download (vLLM's own
limit is 20, unless ``--max-logprobs`` says otherwise)."""


def most_probable(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable token and its probability (temperature 0).

    Exponentials in float32, their sum in float64: the most probable token's own is exactly 1, and
    what stands against it is not lost beside that. So of two rows that are all but sure, the surer
    one is known as far as in float64.

    Accuracy: an exponential is that of a logit moved by at most 2^-22 of its distance d to the
    largest one, times 1 +- 2^-22. Let rest be the sum of the others: their mean d, weighted by the
    softmax, is at most ln(V / rest), since no entropy is above ln V. So a probability p =
    1 / (1 + rest) is off by at most p (1 - p) (ln(V / rest) + 1) 2^-22, which up to V = 2^18 is
    below 2^-20. (A float32 logit between 8 and 16 is itself rounded by up to 2^-21, a bfloat16 one
    by up to 2^-5.)

    Args:
        logits: [W, V].

    Returns:
        int64 [W] and float64 [W]; a row with a NaN has probability NaN.
    """
    if logits.is_cuda:
        # Triton need not be there elsewhere.
        from vllm_elastic.runner.candidate_kernel import most_probable_by_kernel

        return most_probable_by_kernel(logits)
    best, token_ids = logits.max(dim=-1)
    total = best.new_empty(len(logits), dtype=torch.float64)
    for rows in _some_at_once(logits):
        odds = logits[rows].to(torch.float32, copy=True).sub_(best[rows].float()[:, None]).exp_()
        torch.sum(odds, dim=-1, dtype=torch.float64, out=total[rows])
        del odds  # before the next ones are made
    return token_ids, total.reciprocal_()


def sampled(
    logits: torch.Tensor, sampling: Sampling, step: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sampled token and its probability, for one request's window rows.

    Gumbel-max in float64 over the tempered logits that top-k, top-p and min-p leave, as LLaDA's
    authors sample. The confidence is the token's probability at temperature 1, as theirs is.

    Args:
        logits: [W, V], constrained already.
        step: denoising step; with ``positions`` int64 [W] it selects the random numbers.

    Returns:
        int64 [W] and float64 [W].
    """
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for rows in _some_at_once(logits, _COPIES_OF_SAMPLED):
        wide = logits[rows].double()
        tempered = _filtered(wide / sampling.temperature, sampling)
        chosen = _drawn(tempered, sampling, step, positions[rows])
        token_ids[rows] = chosen
        confidence[rows] = wide.softmax(dim=-1).gather(-1, chosen[:, None])[:, 0]
        del wide, tempered  # before the next ones are made
    return token_ids, confidence


def as_dream(
    logits: torch.Tensor, sampling: Sampling, step: int, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token, most probable or sampled, and its confidence as ``sampling.alg`` has it.

    Dream's sampler reads the confidence from the distribution that it samples from, tempered and
    filtered. (Here in float64, in Dream's code in the logits' type; and of top-k and top-p
    this applies top-k first, as vLLM does, which matters only where both are given.)

    Args, returns: as of ``sampled``. A confidence may be negative.
    """
    assert sampling.alg is not None
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    confidence = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for rows in _some_at_once(logits, _COPIES_OF_SAMPLED):
        wide = logits[rows].double()
        if sampling.temperature > 0:
            wide = _filtered(wide / sampling.temperature, sampling)
            chosen = _drawn(wide, sampling, step, positions[rows])
        else:
            chosen = wide.argmax(dim=-1)
        token_ids[rows] = chosen
        confidence[rows] = _confidence(wide.softmax(dim=-1), chosen, sampling.alg)
        del wide  # before the next ones are made
    return token_ids, confidence


def _drawn(
    tempered: torch.Tensor, sampling: Sampling, step: int, positions: torch.Tensor
) -> torch.Tensor:
    """int64 [W], drawn from the softmax of float64 [W, V] by Gumbel-max."""
    noise = uniform(sampling.seed, step, positions, tempered.shape[-1])
    return (tempered - torch.log(-torch.log(noise))).argmax(dim=-1)


def _confidence(probabilities: torch.Tensor, chosen: torch.Tensor, alg: str) -> torch.Tensor:
    """float64 [W] of distributions [W, V] and the tokens int64 [W] chosen from them."""
    if alg == "entropy":
        return (probabilities * torch.log(probabilities + 1e-10)).sum(dim=-1)
    if alg == "topk_margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(dim=-1)
        return first - second
    return probabilities.gather(-1, chosen[:, None])[:, 0]


def leave_out_of_confidence(
    confidence: torch.Tensor,
    token_ids: torch.Tensor,
    logits: torch.Tensor,
    unconfident: torch.Tensor,
) -> None:
    """Read the confidence again, in place, as if the logits of some tokens were -inf.

    LLaDA's ``confidence_eos_eot_inf``: its generation code sets the logits of the end of text and
    of turn to -inf after the predictions are taken and before the softmax, so a predicted end has
    confidence 0, and the others have their share of what is left. (At a temperature above 0 its
    code reaches the end of turn only: the end of text's -inf goes to the copy with the noise, which
    nothing reads any more. Here both, at any temperature, as its documentation says.)

    Args:
        confidence: float64 [W] of the predictions int64 [W]; a NaN stays.
        logits: [W, V], constrained already, without noise.
        unconfident: int64 [N], their ids.
    """
    for rows in _some_at_once(logits):
        wide = logits[rows].to(torch.float64, copy=True)
        wide.index_fill_(-1, unconfident, -torch.inf)
        wide.sub_(wide.amax(dim=-1, keepdim=True)).exp_()
        left = wide.gather(-1, token_ids[rows, None])[:, 0] / wide.sum(dim=-1)
        del wide  # before the next ones are made
        # An end's is 0 by its name: where a request allows nothing but ends, `left` is NaN.
        ends = (token_ids[rows, None] == unconfident).any(dim=-1)
        confidence[rows] = torch.where(ends, 0.0 * confidence[rows], left)


def entropies_of(logits: torch.Tensor) -> torch.Tensor:
    """float64 [W], in nats, of the distributions of logits [W, V], constrained already.

    Of the logits that the candidates are chosen from, at temperature 1 as their probability is.
    """
    entropies = torch.empty(len(logits), dtype=torch.float64, device=logits.device)
    for rows in _some_at_once(logits, _COPIES_OF_ENTROPIES):
        wide = logits[rows].softmax(dim=-1, dtype=torch.float64)
        entropies[rows] = torch.special.entr(wide).sum(dim=-1)
        del wide  # before the next ones are made
    return entropies


def logprobs_of(
    logits: torch.Tensor, token_ids: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities of the chosen tokens and of the ``count`` most probable ones (-1: all).

    Args:
        logits: [W, V] as the model gave them (without the mask token), token_ids: int64 [W].

    Returns:
        What ``plan.Logprobs`` is made of, on the logits' device. Of more than a few alternatives
        on the host: they are brought there some rows at a time, since kept they would take the
        room of all logits.
    """
    kept = logits.device if 0 <= count <= _FEW_ALTERNATIVES else torch.device("cpu")
    parts = []
    for rows in _some_at_once(logits, _COPIES_OF_LOGPROBS[count < 0]):
        logprobs = logits[rows].float().log_softmax(dim=-1)
        chosen = logprobs.gather(-1, token_ids[rows, None])
        ranks = (logprobs >= chosen).sum(dim=-1, dtype=torch.int32)
        top, top_ids = logprobs.topk(logits.shape[-1] if count < 0 else count, dim=-1)
        ids = torch.cat([token_ids[rows, None], top_ids], dim=-1).to(torch.int32)
        part = ids, torch.cat([chosen, top], dim=-1), ranks
        parts.append([tensor.to(kept) for tensor in part])
        del logprobs, top, top_ids, ids, part  # before the next ones are made
    ids, logprobs, ranks = map(torch.cat, zip(*parts, strict=True))
    return ids, logprobs, ranks


def _some_at_once(logits: torch.Tensor, copies: int = 1) -> Iterator[slice]:
    """Rows of [W, V] that are worked on together, so that their copies are within the bound."""
    count = max(1, _NUMBERS_AT_ONCE[logits.is_cpu] // (copies * logits.shape[-1]))
    for start in range(0, len(logits), count):
        yield slice(start, start + count)


def _filtered(tempered: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Tempered logits [W, V] with what min-p, top-k and top-p exclude at -inf."""
    if sampling.min_p > 0:
        floor = tempered.amax(dim=-1, keepdim=True) + np.log(sampling.min_p)
        tempered = tempered.masked_fill(tempered < floor, -torch.inf)
    if 0 < sampling.top_k < tempered.shape[-1]:
        smallest = tempered.topk(sampling.top_k, dim=-1).values[:, -1:]
        tempered = tempered.masked_fill(tempered < smallest, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = tempered.sort(dim=-1, descending=True, stable=True)
        before = ordered.softmax(dim=-1).cumsum(dim=-1).roll(1, dims=-1)
        before[:, 0].zero_()
        ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
        tempered = torch.empty_like(ordered).scatter_(-1, order, ordered)
    return tempered

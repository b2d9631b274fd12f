# SPDX-License-Identifier: Apache-2.0
"""The kernel that draws tokens, against torch's operators request by request: in Triton's
interpreter, or on a GPU where there is one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests import triton_interpreter  # noqa: F401
from tests.device import DEVICE
from vllm_elastic.decoding.plan import PassKind, PassPlan
from vllm_elastic.decoding.sampling import Sampling
from vllm_elastic.runner.candidates import as_dream, sampled
from vllm_elastic.runner.draws import Draws, is_drawn
from vllm_elastic.runner.sampling_kernel import sample_by_kernel
from vllm_elastic.runner.upload import Upload

VOCAB = 2500  # two blocks of the kernel, and one that is not full

WISHES = {
    "temperature": Sampling(temperature=0.7, seed=3),
    "hot": Sampling(temperature=2.5, seed=-4),
    "top-k": Sampling(temperature=1.0, top_k=7, seed=5),
    "all but one": Sampling(temperature=1.0, top_k=VOCAB - 1, seed=5),
    "only the first": Sampling(temperature=1.0, top_k=1, seed=5),
    "top-p": Sampling(temperature=0.8, top_p=0.6, seed=6),
    "nearly all": Sampling(temperature=1.5, top_p=0.999, seed=7),
    "hardly any": Sampling(temperature=1.5, top_p=1e-9, seed=7),
    "min-p": Sampling(temperature=1.3, min_p=0.05, seed=8),
    "three at once": Sampling(temperature=1.2, top_k=40, top_p=0.8, min_p=0.01, seed=9),
    "dream": Sampling(temperature=0.4, top_p=0.95, alg="entropy", seed=10),
    "dream, margin": Sampling(temperature=0.9, top_k=5, alg="topk_margin", seed=11),
    "dream, maskgit": Sampling(temperature=0.9, top_p=0.5, alg="maskgit_plus", seed=12),
    "dream, cold": Sampling(alg="entropy"),
    "dream, cold margin": Sampling(alg="topk_margin"),
    "dream, cold random order": Sampling(alg="origin"),
}
PLAIN = Sampling(num_logprobs=2)  # among the wishes and not drawn


def plans_of(wishes: list[Sampling | None], width: int = 3) -> list[PassPlan]:
    plans = []
    for index, sampling in enumerate(wishes):
        window = np.arange(5 * index, 5 * index + width, dtype=np.int32)
        plan = PassPlan("", PassKind.WINDOW, index, [], window, window, sampling=sampling)
        plans.append(plan)
    return plans


def logits_of(rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Where numbers are coarse, many are equal."""
    generator = torch.Generator().manual_seed(rows)
    return (3 * torch.randn(rows, VOCAB, generator=generator)).to(dtype)


def by_kernel(
    plans: list[PassPlan], logits: torch.Tensor, at_once: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are not drawn keep -1."""
    upload = Upload(torch.device(DEVICE))
    upload.start()
    slices, stop = [], 0
    for plan in plans:
        slices.append(slice(stop, stop := stop + len(plan.window)))
    draws = Draws(plans, slices, upload)
    upload.send()
    token_ids = torch.full((stop,), -1, dtype=torch.int64, device=DEVICE)
    probabilities = torch.full((stop,), -1.0, dtype=torch.float64, device=DEVICE)
    logits = logits.to(DEVICE)
    for start in range(0, stop, at_once or stop):
        rows = slice(start, min(stop, start + (at_once or stop)))
        sample_by_kernel(logits[rows], draws, rows, token_ids[rows], probabilities[rows])
    return token_ids.cpu(), probabilities.cpu()


def by_torch(plans: list[PassPlan], logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    token_ids, probabilities, start = [], [], 0
    for plan in plans:
        own, start = logits[start : start + len(plan.window)], start + len(plan.window)
        sampling = plan.sampling
        if sampling is None or not is_drawn(sampling):
            token_ids.append(torch.full((len(own),), -1))
            probabilities.append(torch.full((len(own),), -1.0, dtype=torch.float64))
            continue
        choose = sampled if sampling.alg is None else as_dream
        positions = torch.from_numpy(plan.window.astype(np.int64))
        found = choose(own, sampling, plan.denoising_step, positions)
        token_ids.append(found[0])
        probabilities.append(found[1])
    return torch.cat(token_ids), torch.cat(probabilities)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    plans = plans_of([WISHES["three at once"], WISHES["dream"]], 1)
    logits = logits_of(2, dtype)
    token_ids, probabilities = by_kernel(plans, logits)
    wanted = by_torch(plans, logits)
    assert token_ids.tolist() == wanted[0].tolist()
    torch.testing.assert_close(probabilities, wanted[1], rtol=1e-5, atol=1e-6)


def test_requests_of_every_kind_in_one_launch() -> None:
    plans = plans_of([None, *WISHES.values(), PLAIN], 2)
    logits = logits_of(2 * len(plans), torch.bfloat16)
    wanted = by_torch(plans, logits)
    whole = by_kernel(plans, logits)
    assert whole[0].tolist() == wanted[0].tolist()
    torch.testing.assert_close(whole[1], wanted[1], rtol=1e-5, atol=1e-6)


def test_rows_in_parts() -> None:
    """Which part requests too; parts without a draw have no launch."""
    plans = plans_of([None, None, WISHES["hot"], PLAIN, WISHES["min-p"], None])
    logits = logits_of(18, torch.bfloat16)
    whole, in_parts = by_kernel(plans, logits), by_kernel(plans, logits, at_once=4)
    assert torch.equal(whole[0], in_parts[0]) and torch.equal(whole[1], in_parts[1])
    assert (whole[0] >= 0).tolist() == [*[False] * 6, *[True] * 3, *[False] * 3, *[True] * 3] + [
        False
    ] * 3


def test_equal_logits_at_top_ps_edge() -> None:
    """Of five equal ones with a fifth of it each, half leaves the first two and a half: three."""
    logits = torch.full((8, VOCAB), -100.0, dtype=torch.bfloat16)
    logits[:, [9, 1200, 1201, 2400, 2499]] = 0.0
    wishes: list[Sampling | None] = [
        Sampling(temperature=1.0, top_p=0.5, seed=seed) for seed in range(8)
    ]
    token_ids, probabilities = by_kernel(plans_of(wishes, 1), logits)
    assert set(token_ids.tolist()) == {9, 1200, 1201}
    torch.testing.assert_close(probabilities, torch.full((8,), 0.2, dtype=torch.float64))


def test_zeros_of_either_sign_are_equal() -> None:
    logits = torch.full((8, VOCAB), -100.0, dtype=torch.bfloat16)
    logits[:, 3], logits[:, 4] = -0.0, 0.0
    wishes: list[Sampling | None] = [
        Sampling(temperature=1.0, top_k=1, seed=seed) for seed in range(8)
    ]
    assert set(by_kernel(plans_of(wishes, 1), logits)[0].tolist()) == {3, 4}


@pytest.mark.parametrize("name", ["top-p", "dream, margin"])
def test_broken_rows(name: str) -> None:
    """A NaN, or nothing that is allowed, is no number; forbidden tokens are not drawn."""
    logits = logits_of(3, torch.float32)
    logits[0, 1700] = float("nan")
    logits[1] = float("-inf")
    logits[2, : VOCAB - 2] = float("-inf")
    token_ids, probabilities = by_kernel(plans_of([WISHES[name]]), logits)
    assert torch.isnan(probabilities).tolist() == [True, True, False]
    assert token_ids[2] >= VOCAB - 2 and ((token_ids >= 0) & (token_ids < VOCAB)).all()

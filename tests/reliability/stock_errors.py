# SPDX-License-Identifier: Apache-2.0
"""Server errors (5xx) that stock vLLM gives for any model. Each was traced to its cause.

``fuzz`` counts them apart; every other 5xx is a failure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.reliability.exchange import Answer, Ask


@dataclass(frozen=True)
class StockError:
    """A known one.

    Attributes:
        name: short, for the closing table.
        cause: what happens, and where in vLLM 0.32.
        is_it: whether an answer to a request is this one.
    """

    name: str
    cause: str
    is_it: Callable[[Ask, Answer], bool]


STOCK_ERRORS = (
    StockError(
        "501 of an endpoint for other models",
        "/v1/systemone wants a model with a structured decision API. 501 is what the OpenAPI "
        "description promises.",
        lambda ask, answer: answer.status == 501 and "does not support" in answer.error,
    ),
    StockError(
        "structured_outputs that is no object",
        "`check_structured_outputs_count` of the chat and completion protocols runs before types "
        "are checked and calls `.get` on whatever was sent: AttributeError.",
        lambda ask, answer: "object has no attribute 'get'" in answer.error,
    ),
    StockError(
        "a grammar that no token of the model goes on with",
        "All logits are masked, whatever is chosen is rejected by the grammar, and the request "
        "ends with FINISHED_ERROR, for which the server has one text. The test model's words "
        "cannot spell everything, a tokenizer of bytes can.",
        lambda ask, answer: (
            "structured_outputs" in str(ask)
            and "Internal server error" in answer.error
            and not _rules_out_its_end(ask)
        ),
    ),
    StockError(
        "deeply nested JSON at /invocations",
        "`sagemaker/api_router.py` parses the body itself and catches JSONDecodeError only: "
        "RecursionError of json.loads.",
        lambda ask, answer: (
            ask.path == "/invocations" and "maximum recursion depth exceeded" in answer.error
        ),
    ),
)


def stock_error(ask: Ask, answer: Answer) -> StockError | None:
    """The known error that this answer is."""
    return next((known for known in STOCK_ERRORS if known.is_it(ask, answer)), None)


def _rules_out_its_end(ask: Ask) -> bool:
    """Whether a request forbids the end token: beside a grammar admission has to refuse it."""
    body = ask.body if isinstance(ask.body, dict) else {}
    xargs, allowed = body.get("vllm_xargs"), body.get("allowed_token_ids")
    return bool(
        body.get("min_tokens")
        or (isinstance(xargs, dict) and xargs.get("elastic_logits_eos_inf"))
        or (isinstance(allowed, list) and allowed and 0 not in allowed)  # the test model's
    )

# SPDX-License-Identifier: Apache-2.0
"""Replicas of vLLM's own OpenAI server behind one endpoint of Ray Serve.

serve run app:app model=DIRECTORY replicas=2 options="--max-model-len 4096"
"""

# No `from __future__ import annotations`: Serve reads the builder's annotation, not its name.

import asyncio
import os
import shlex
from argparse import Namespace
from types import SimpleNamespace
from typing import Any

from pydantic import BaseModel
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOK_SECONDS = 0.1  # how often a replica looks whether its engine is alive
LAST_WORDS_SECONDS = 0.5  # for the error messages of a dead engine to reach their clients


class Arguments(BaseModel):
    """What ``serve run app:app name=value ...`` takes.

    Args:
        model: what ``vllm serve`` would be given.
        replicas: how many engines; each has the whole model.
        cpus: what Ray sets aside for a replica.
        options: further options of ``vllm serve``, as on its command line.
    """

    model: str
    replicas: int = 2
    cpus: float = 1.0
    options: str = ""


def app(arguments: Arguments) -> serve.Application:
    """The application that ``serve run`` deploys."""
    deployment = Replica.options(
        num_replicas=arguments.replicas, ray_actor_options={"num_cpus": arguments.cpus}
    )
    return deployment.bind(
        [arguments.model, "--plugin", "elastic", *shlex.split(arguments.options)]
    )


@serve.deployment(max_ongoing_requests=256)  # vLLM queues by itself
@serve.ingress()
class Replica:
    """An engine, and vLLM's own application in front of it."""

    async def __init__(self, options: list[str]) -> None:
        # Here and not above: the process that deploys needs no vLLM.
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._arguments = parse(options)
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs.from_cli_args(self._arguments))
        self._watch = asyncio.create_task(self._end_with_the_engine())

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app

        tasks = await self._engine.get_supported_tasks()
        application = build_app(self._arguments, tasks, self._engine.model_config)
        await init_app_state(self._engine, application.state, self._arguments, tasks)
        # vLLM tells its own HTTP server here that the engine died; Serve's is not its to end.
        application.state.server = SimpleNamespace(should_exit=False)
        replica = serve.get_replica_context().replica_id.unique_id
        return ReplicaHeader(application, f"{replica}:{os.getpid()}")

    async def check_health(self) -> None:
        """Asked by Serve every few seconds."""
        await self._engine.check_health()

    async def _end_with_the_engine(self) -> None:
        """Leave as ``vllm serve`` does when its engine dies, for Serve to start another replica.

        A replica without an engine would be the least busy one, and take every new request.
        """
        while not self._engine.errored:
            await asyncio.sleep(LOOK_SECONDS)
        await asyncio.sleep(LAST_WORDS_SECONDS)
        self._engine.shutdown()
        os._exit(1)

    def __del__(self) -> None:
        if hasattr(self, "_watch"):  # it had started
            self._watch.cancel()
            self._engine.shutdown()


class ReplicaHeader:
    """Says in each response which replica it is of: ``x-replica: <name>:<process id>``."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app = app
        self.replica = replica

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-replica"] = self.replica
            await send(message)

        await self.app(scope, receive, send_with_header)


def parse(options: list[str]) -> Namespace:
    """``vllm serve``'s own command line.

    Args:
        options: the model, and options of ``vllm serve``.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments: Any = make_arg_parser(FlexibleArgumentParser()).parse_args(options)
    arguments.model = arguments.model_tag
    validate_parsed_serve_args(arguments)
    return arguments

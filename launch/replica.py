"""A replica: this project's server in Ray's own LLM deployment (ray/serve/llm), under its flags."""

from argparse import Namespace
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import ray
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from uvicorn import Config
from uvicorn.lifespan.on import LifespanOn
from vllm import AsyncEngineArgs
from vllm.config import VllmConfig
from vllm.usage.usage_lib import UsageContext

from launch.exchange import Answer, Forwarded, exchange
from launch.metrics import exported
from vllm_sink.plugin.refusal import passed_on
from vllm_sink.serve import completed, make_parser
from vllm_sink.server import sessions

FLAGS = "vllm_sink_flags"
"""Where in an `LLMConfig`'s `experimental_configs` the server's flags are, as on a command line."""
EXECUTOR = "distributed_executor_backend"
HEADER = b"x-replica"
"""Of each answer: who gave it."""


class NoDownload(CallbackBase):
    """Leaves it to vLLM to find and load the model, as its flags say."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class Engine(VLLMEngine):
    """Ray's, started with the arguments that `python -m vllm_sink.serve` makes of its flags."""

    def _prepare_engine_config(
        self, callback_ctx: Any
    ) -> tuple[AsyncEngineArgs, Namespace, VllmConfig]:
        """Made where the accelerator is, which the replica's own process may not see."""
        flags = flags_of(self.llm_config)
        accelerator = self.llm_config.get_engine_config().accelerator
        if accelerator.requires_remote_initialization:
            remote = ray.remote(engine_of).options(
                num_cpus=0,
                runtime_env=callback_ctx.runtime_env,
                scheduling_strategy=PlacementGroupSchedulingStrategy(callback_ctx.placement_group),
                **accelerator.get_remote_options(self.llm_config.accelerator_type),
            )
            made = ray.get(remote.remote(flags))
        else:
            made = engine_of(flags)
        _, args, _ = made
        sessions.prepare(args)
        return made


class Server(LLMServer):
    """Ray's, which answers HTTP requests with vLLM's own app, and so with all of its routes."""

    _default_engine_cls = Engine

    async def start(self) -> None:
        """Raises `SettingsError`, one sentence, on flags that cannot work."""
        args = make_parser().parse_args(flags_of(self._llm_config))
        await sessions.require_store(args)
        with passed_on():
            await super().start()
        self.app = await self.engine.build_asgi_app()
        await LifespanOn(Config(self.app, lifespan="on")).startup()
        self.id = serve.get_replica_context().replica_id.unique_id.encode()
        self.exported = exported()

    async def http(self, forwarded: Forwarded) -> AsyncGenerator[Answer, None]:
        async for part in exchange(self.app, forwarded):
            if isinstance(part, bytes):
                yield part
            else:
                status, headers = part
                yield status, [*headers, (HEADER, self.id)]


def flags_of(llm_config: LLMConfig) -> Sequence[str]:
    """With the executor that Ray asks for: its own where workers have GPUs."""
    executor = llm_config.get_engine_config().get_initialization_kwargs()[EXECUTOR]
    return [*llm_config.experimental_configs[FLAGS], f"--{EXECUTOR}={executor}"]


def engine_of(flags: Sequence[str]) -> tuple[AsyncEngineArgs, Namespace, VllmConfig]:
    args = completed(flags)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    return engine_args, args, engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)

"""The Ray Serve application: replicas of the server, behind an ingress that knows of sessions."""

from argparse import Namespace
from typing import Annotated, Any, NoReturn

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
)
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.llm import LLMConfig, build_llm_deployment

from launch.ingress import Ingress
from launch.replica import FLAGS, NoDownload, Server
from launch.router import SessionRouter
from vllm_sink import embedded
from vllm_sink.serve import ENVIRONMENT, make_parser
from vllm_sink.settings import SettingsError, sentence_of

HELD = 0.75
"""Streams held, of those that a replica runs at once, from which on there is to be another one."""
ALIVE_SECONDS = 2
"""Between two looks at an engine; after three that fail Ray replaces its replica."""
INGRESS_STREAMS = 1000
"""That an ingress carries, before there is to be another one."""

Amount = Annotated[float, Field(ge=0.0001, allow_inf_nan=False)]
"""Of a resource; Ray counts no finer."""

LOGGING = {"enable_access_log": False}
"""A line for each request is the proxy's to write."""


class Settings(BaseModel):
    """The application's `args` in a config file of Ray Serve."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flags: dict[str, Any] = {}
    """Of `python -m vllm_sink.serve`, without their dashes."""
    replicas: PositiveInt = 1
    """As many, where they do not follow the streams that they hold ..."""
    autoscaling: dict[str, Any] | None = None
    """... as Ray's autoscaling_config says (ray/serve/config.py)."""
    streams: PositiveInt = 128
    """That a replica runs at once (vLLM's max-num-seqs)."""
    waiting: int = Field(default=256, ge=0)
    """Requests that wait at an ingress for a replica; the next one gets 429."""
    turn_seconds: PositiveFloat = 3600
    """A replica that is to go finishes its turns, for so long."""
    cpus: Amount = 1
    """Of a replica's own process, and of the ingress; its workers' are in `worker`."""
    worker: dict[str, Amount] = {"GPU": 1}
    """Ray's resources of a worker; a replica has as many as its flags say."""
    accelerator_type: str | None = None
    """As Ray names them (ray/util/accelerators)."""
    env: dict[str, str] = {}
    """Of the replicas' processes."""

    @field_validator("autoscaling")
    @classmethod
    def _is_rays(cls, autoscaling: dict[str, Any] | None) -> dict[str, Any] | None:
        accepted = AutoscalingConfig.model_fields
        if unknown := [name for name in autoscaling or {} if name not in accepted]:
            raise ValueError(f"{unknown[0]}: unknown; accepted keys are {', '.join(accepted)}")
        try:
            AutoscalingConfig.model_validate(autoscaling or {})
        except ValidationError as error:
            raise ValueError(sentence_of(error)) from None
        return autoscaling

    def arguments(self) -> list[str]:
        """Of the server, as on its command line."""
        flags = self.flags | {"max-num-seqs": self.streams}
        if "model" not in flags:
            model = embedded.path()
            flags = {"served-model-name": model.name} | flags | {"model": str(model)}
        arguments = []
        for name, value in flags.items():
            if isinstance(value, list):
                arguments += [f"--{name}", *map(str, value)]
            elif value is not False:
                arguments.append(f"--{name}" if value is True else f"--{name}={value}")
        return arguments

    def server(self) -> Namespace:
        """Raises `SettingsError` on what is no flag, or no value of one."""
        parser = make_parser()
        parser.error = refuse
        parser.exit = lambda *_: refuse("one of them asks for help; accepted are settings")
        server = parser.parse_args(self.arguments())
        if server.data_parallel_size > 1:
            refuse(f"data-parallel-size={server.data_parallel_size}: accepted is 1; replicas do it")
        return server

    def resources(self) -> dict[str, float]:
        """Ray's, of all replicas that there are at first, and of an ingress."""
        first = self.replicas
        if self.autoscaling is not None:
            least = self.autoscaling.get("min_replicas", 1)
            first = self.autoscaling.get("initial_replicas") or least
        server = self.server()
        workers = server.tensor_parallel_size * server.pipeline_parallel_size
        needed = {name: first * workers * amount for name, amount in self.worker.items()}
        return needed | {"CPU": needed.get("CPU", 0) + (first + 1) * self.cpus}


def parse(args: dict[str, Any]) -> Settings:
    """Raises `SettingsError`, one sentence."""
    try:
        return Settings.model_validate(args)
    except ValidationError as error:
        raise SettingsError(sentence_of(error, keys=Settings.model_fields)) from None


def build(args: dict[str, Any]) -> Application:
    """What a config file of Ray Serve names; raises `SettingsError`, one sentence."""
    try:
        return application(parse(args))
    except ValidationError as error:
        raise SettingsError(sentence_of(error)) from None


def application(settings: Settings) -> Application:
    servers = build_llm_deployment(llm_config(settings), deployment_cls=Server)
    return ingress(settings).bind(servers)


def llm_config(settings: Settings) -> LLMConfig:
    server = settings.server()
    return LLMConfig(
        model_loading_config={
            "model_id": (server.served_model_name or [server.model])[0],
            "model_source": server.model,
        },
        engine_kwargs={
            "tensor_parallel_size": server.tensor_parallel_size,
            "pipeline_parallel_size": server.pipeline_parallel_size,
        },
        accelerator_type=settings.accelerator_type,
        placement_group_config={"bundle_per_worker": settings.worker},
        runtime_env={"env_vars": ENVIRONMENT | settings.env},
        callback_config={"callback_class": NoDownload},
        deployment_config=replicas(settings),
        experimental_configs={FLAGS: settings.arguments()},
    )


def replicas(settings: Settings) -> dict[str, Any]:
    """Of the replicas' deployment."""
    number: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.autoscaling is not None:
        held = max(1, int(HELD * settings.streams))
        number = {"autoscaling_config": {"target_ongoing_requests": held, **settings.autoscaling}}
    return number | {
        "ray_actor_options": {"num_cpus": settings.cpus},
        "max_ongoing_requests": settings.streams,
        "max_queued_requests": settings.waiting,
        "health_check_period_s": ALIVE_SECONDS,
        "graceful_shutdown_timeout_s": settings.turn_seconds,
        "request_router_config": RequestRouterConfig(request_router_class=SessionRouter),
        "logging_config": LOGGING,
    }


def ingress(settings: Settings) -> Deployment:
    return serve.deployment(Ingress).options(
        ray_actor_options={"num_cpus": settings.cpus},
        autoscaling_config={"target_ongoing_requests": INGRESS_STREAMS, "min_replicas": 1},
        max_ongoing_requests=2 * INGRESS_STREAMS,
        graceful_shutdown_timeout_s=settings.turn_seconds,
        logging_config=LOGGING,
    )


def refuse(message: str) -> NoReturn:
    raise SettingsError(f"flags: {message}")

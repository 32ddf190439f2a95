"""The application of launch/app.py, whose router can also do without affinity."""

from typing import Any

from ray.serve import Application
from ray.serve.config import RequestRouterConfig
from ray.serve.llm import build_llm_deployment
from ray.serve.request_router import PendingRequest, RunningReplica

from benchmarks.harness.fleet import SPREAD
from launch.app import ingress, llm_config, parse
from launch.replica import Server
from launch.router import SessionRouter


class EitherRouter(SessionRouter):
    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request and pending_request.metadata.session_id.startswith(SPREAD):
            pending_request.metadata.session_id = ""
        return await super().choose_replicas(candidate_replicas, pending_request)


def build(args: dict[str, Any]) -> Application:
    settings = parse(args)
    config = llm_config(settings)
    config.deployment_config["request_router_config"] = RequestRouterConfig(
        request_router_class=EitherRouter
    )
    return ingress(settings).bind(build_llm_deployment(config, deployment_cls=Server))

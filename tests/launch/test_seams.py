"""Every name of Ray that is not promised to stay, and that we override or rely on.

A failure here, after an upgrade, names the seam that moved: look there before anywhere else.
"""

import inspect
from importlib import import_module
from importlib.metadata import requires, version
from typing import Any

import pytest
from packaging.requirements import Requirement
from ray.llm._internal.common.callbacks.base import CallbackBase, CallbackCtx
from ray.llm._internal.serve.core.configs.accelerators import CPUAccelerator, GPUAccelerator
from ray.serve._private.config import DeploymentConfig
from ray.serve.config import HTTPOptions
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer

from launch.app import llm_config, parse
from launch.replica import FLAGS, Engine, Server, flags_of
from vllm_sink.serve import make_parser

ENGINE = "ray.llm._internal.serve.engines.vllm.vllm_engine:VLLMEngine"
ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"

PARAMETERS = {
    # launch/replica.py
    f"{ENGINE}._prepare_engine_config": "self callback_ctx",
    f"{ENGINE}.start": "self",
    f"{ENGINE}.build_asgi_app": "self",
    "ray.serve.llm.deployment:LLMServer.start": "self",
    "ray.serve.llm:build_llm_deployment": "llm_config name_prefix bind_kwargs "
    "override_serve_options deployment_cls",
    # launch/cluster.py
    "ray.serve.context:_get_global_client": "raise_if_no_controller_running",
    "ray.serve._private.client:ServeControllerClient.deploy_apps": "self config _blocking",
    # launch/router.py
    f"{ROUTER}.choose_replicas": "self candidate_replicas pending_request",
    f"{ROUTER}._routing_key": "self pending_request",
}


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    thing: Any = import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path: str) -> None:
    function = found(path)
    function = getattr(function, "__wrapped__", function)
    assert " ".join(inspect.signature(function).parameters) == PARAMETERS[path]


def test_ray_is_the_one_that_was_tried() -> None:
    (wanted,) = (
        requirement
        for requirement in map(Requirement, requires("vllm-sink") or ())
        if requirement.name == "ray"
    )
    assert version("ray") in wanted.specifier
    assert len(wanted.specifier) == 1


def test_an_engine_is_ours() -> None:
    assert Server._get_default_engine_class(Server.__new__(Server)) is Engine
    assert LLMServer._default_engine_cls is None


def test_what_is_prepared_is_what_the_engine_starts_with() -> None:
    """It goes by attributes of the second, which may have more than Ray's, and of the first."""
    source = inspect.getsource(found(f"{ENGINE}.start"))
    assert "vars(vllm_frontend_args) | vars(vllm_engine_args)" in source


def test_a_callback_may_leave_out_the_download() -> None:
    assert CallbackCtx().run_init_node
    assert inspect.iscoroutinefunction(CallbackBase.on_before_node_init)


def test_engines_are_configured_where_their_accelerator_is() -> None:
    assert GPUAccelerator().requires_remote_initialization
    assert not CPUAccelerator().requires_remote_initialization
    flags = {"model": "m", "tensor-parallel-size": 2}
    for worker, kind, executor in (({"CPU": 1.0}, "cpu", "mp"), ({"GPU": 1.0}, "gpu", "ray")):
        config = llm_config(parse({"flags": flags, "worker": worker}))
        assert config.accelerator_config.kind == kind
        assert config.get_engine_config().placement_bundles == [worker] * 2
        assert make_parser().parse_args(flags_of(config)).distributed_executor_backend == executor


def test_flags_travel_with_the_config() -> None:
    config = llm_config(parse({"flags": {"model": "m"}}))
    copied = LLMConfig.model_validate(config.model_dump())
    assert copied.experimental_configs[FLAGS] == ["--model=m", "--max-num-seqs=128"]


def test_options_are_rays() -> None:
    options = llm_config(parse({"flags": {"model": "m"}})).deployment_config
    assert options.keys() - {"ray_actor_options"} <= DeploymentConfig.model_fields.keys()


def test_a_turn_may_take_as_long_as_it_likes() -> None:
    """`launch.local` names no time-out."""
    assert HTTPOptions().request_timeout_s is None

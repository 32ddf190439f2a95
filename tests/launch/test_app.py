from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from launch.app import Settings, build, llm_config, parse, replicas
from vllm_sink.settings import SettingsError

LAUNCH = Path(__file__).parents[2] / "launch"
MODEL = {"model": "m", "served-model-name": "n"}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"replica": 2}, "replica=2: unknown; accepted keys are flags, replicas, "),
        ({"replicas": 0}, "replicas=0: input should be greater than 0"),
        ({"streams": "many"}, "streams='many': "),
        ({"cpus": float("inf")}, "cpus=inf: input should be a finite number"),
        ({"worker": {"CPU": -1}}, "worker.CPU=-1: input should be greater than or equal to "),
        ({"autoscaling": {"max": 3}}, "max: unknown; accepted keys are min_replicas, "),
        ({"autoscaling": {"min_replicas": "a"}}, "min_replicas='a': input should be a valid int"),
        ({"flags": MODEL, "accelerator_type": "none"}, "accelerator_type='none': unsupported "),
        ({"flags": MODEL | {"help": True}}, "flags: one of them asks for help; accepted are "),
        ({"flags": MODEL | {"windows": 3}}, "flags: unrecognized arguments: --windows=3"),
        ({"flags": MODEL | {"sink-tokens": "few"}}, "flags: argument --sink-tokens: invalid int"),
        ({"flags": MODEL | {"data-parallel-size": 2}}, "data-parallel-size=2: accepted"),
    ],
)
def test_bad_settings_are_refused_in_a_sentence(args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as refusal:
        build(args)
    assert "\n" not in str(refusal.value)


def test_flags_are_those_of_the_command_line() -> None:
    more = {"enforce-eager": True, "trust-remote-code": False, "api-key": ["a", "b"]}
    assert parse({"flags": MODEL | more}).arguments() == [
        *("--model=m", "--served-model-name=n", "--enforce-eager", "--api-key", "a", "b"),
        "--max-num-seqs=128",
    ]


def test_without_a_model_it_is_the_embedded_one() -> None:
    server = Settings().server()
    assert server.served_model_name == [Path(server.model).name]
    assert (Path(server.model) / "config.json").exists()


def test_resources_are_those_of_all_workers_and_processes() -> None:
    flags = MODEL | {"tensor-parallel-size": 2}
    assert parse({"flags": flags, "replicas": 3}).resources() == {"GPU": 6, "CPU": 4}
    small = {"flags": flags, "worker": {"CPU": 0.5}, "cpus": 0.25}
    autoscaling = {"min_replicas": 2, "max_replicas": 4}
    assert parse(small | {"autoscaling": autoscaling}).resources() == {"CPU": 2.75}


def test_replicas_are_as_many_as_streams_held_ask_for() -> None:
    options = replicas(parse({"flags": MODEL, "streams": 8, "autoscaling": {"max_replicas": 3}}))
    assert options["autoscaling_config"] == {"target_ongoing_requests": 6, "max_replicas": 3}
    assert options["max_ongoing_requests"] == 8
    assert replicas(parse({"replicas": 2}))["num_replicas"] == 2


@pytest.mark.parametrize("name", ["serve.yaml", "serve.cpu.yaml", "rayservice.yaml"])
def test_configs_build(name: str) -> None:
    config = yaml.safe_load((LAUNCH / name).read_text("utf-8"))
    config = yaml.safe_load(config["spec"]["serveConfigV2"]) if "spec" in config else config
    schema = ServeDeploySchema.model_validate(config)
    (described,) = schema.applications
    assert described.import_path == "launch.app:build"
    options = llm_config(parse(described.args)).deployment_config
    assert options["max_queued_requests"] > 0
    assert schema.http_options.request_timeout_s is None

"""A Ray of its own, on this machine's loopback address, and the application on it."""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import ray
import yaml
from pydantic import ValidationError
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from launch.app import Settings, parse
from vllm_sink.plugin.refusal import one_line
from vllm_sink.settings import SettingsError, sentence_of

HOST = "127.0.0.1"
POLL_SECONDS = 0.5
END_SECONDS = 15
"""For processes of Ray that end by themselves, once they notice that it is gone."""
TOLD = re.compile(r"SettingsError: (.+)")
"""In the traceback of a replica that does not start."""


@contextmanager
def ray_of_its_own(port: int) -> Iterator[None]:
    """With Ray Serve at `port`. Its processes end with it, and its files are gone then."""
    terminate = signal.getsignal(signal.SIGTERM)
    with TemporaryDirectory(prefix="vllm-sink-") as folder:
        environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TMPDIR": folder}
        ray.init(
            address="local",
            include_dashboard=False,
            _temp_dir=folder,
            _node_ip_address=HOST,
            runtime_env={"env_vars": environment},
        )
        # Ray's own aborts this process three seconds later, in the midst of what is below.
        signal.signal(signal.SIGTERM, terminate)
        try:
            serve.start(http_options={"host": HOST, "port": port})
            yield
        finally:
            family = psutil.Process().children(recursive=True)
            # Not `serve.shutdown`, which would wait for turns.
            ray.shutdown()
            _, left = psutil.wait_procs(family, timeout=END_SECONDS)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()


def read(path: Path) -> ServeDeploySchema:
    """A config file of Ray Serve.

    Raises:
        SettingsError: it is none, or not of one application.
    """
    try:
        config = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except ValidationError as error:
        raise SettingsError(f"{path}: {sentence_of(error)}") from None
    except OSError as error:
        raise SettingsError(one_line(error)) from None
    except (RecursionError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {one_line(error)}") from None
    if len(config.applications) != 1:
        count = len(config.applications)
        raise SettingsError(f"{path}: it has {count} applications; accepted is one")
    return config


def deploy(config: ServeDeploySchema) -> None:
    """As `serve deploy` does, whose way is by a dashboard. Returns when requests are taken.

    What a replica's own processes go by starts them anew; numbers in its `deployments` do not.

    Raises:
        SettingsError: it cannot be, in one sentence.
    """
    (described,) = config.applications
    require_resources(parse(described.args))
    _get_global_client().deploy_apps(config)
    while True:
        status = serve.status().applications[described.name]
        if status.status == ApplicationStatus.RUNNING:
            return
        messages = [status.message, *(each.message for each in status.deployments.values())]
        if told := TOLD.search("\n".join(messages)):
            raise SettingsError(told[1])
        if status.status == ApplicationStatus.DEPLOY_FAILED:
            # The last line of a traceback.
            _, _, said = status.message.rstrip().rpartition("\n")
            raise SettingsError(f"Ray could not start it: {said}")
        time.sleep(POLL_SECONDS)


def put_back(config: ServeDeploySchema) -> None:
    """What was deployed before. Returns when replicas that had to go are there again."""
    _get_global_client().deploy_apps(config)
    (described,) = config.applications
    while serve.status().applications[described.name].status == ApplicationStatus.DEPLOYING:
        time.sleep(POLL_SECONDS)


def require_resources(settings: Settings) -> None:
    there = ray.cluster_resources()
    for resource, amount in settings.resources().items():
        if amount > there.get(resource, 0):
            raise SettingsError(
                f"replicas={settings.replicas}: they need {amount:g} {resource} with the ingress, "
                f"this machine has {there.get(resource, 0):g}"
            )

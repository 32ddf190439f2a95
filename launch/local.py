"""The application on this machine alone.

    python -m launch.local launch/serve.cpu.yaml

SIGHUP makes it read the file anew: more or fewer replicas, say.
"""

import argparse
import os
import secrets
import signal
import sys
from pathlib import Path

import yaml

from vllm_sink.settings import SettingsError

PROGRAM = "python -m launch.local"


def main() -> None:
    """Serve until interrupted; exit with status 2 and one sentence on settings that cannot work."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("config", type=Path, help="of Ray Serve, as launch/serve.cpu.yaml")
    parser.add_argument("--port", type=int, help="in place of the config's")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: None)
    refusal = None
    try:
        serve(options.config, options.port)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        refusal = "ray is not installed; accepted is pip install 'vllm-sink[ray]'"
    except (OSError, SettingsError, yaml.YAMLError) as error:
        refusal = " ".join(str(error).split())
    except KeyboardInterrupt:
        pass
    if refusal:
        print(f"{PROGRAM}: error: {refusal}", file=sys.stderr)
        sys.exit(2)


def serve(config: Path, port: int | None) -> None:
    # Before Ray is imported, which reads them then: nobody else is let in, and the token is in no
    # file of the user's.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    from launch import cluster

    read = yaml.safe_load(config.read_text("utf-8"))
    port = port or read["http_options"]["port"]
    with cluster.ray_of_its_own(port):
        while True:
            cluster.deploy(read)
            print(f"Ready at http://{cluster.HOST}:{port}", flush=True)
            signal.pause()
            read = yaml.safe_load(config.read_text("utf-8"))


if __name__ == "__main__":
    main()

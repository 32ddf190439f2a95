"""The application on this machine alone.

    python -m launch.local launch/serve.cpu.yaml

SIGHUP makes it read the file anew. What cannot work is told, and what was before is put
back.
"""

import argparse
import os
import secrets
import signal
import sys
import threading
from pathlib import Path

from vllm_sink.settings import SettingsError

PROGRAM = "python -m launch.local"


def main() -> None:
    """Serve until interrupted; exit with status 2 and one sentence on settings that cannot work."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("config", type=Path, help="of Ray Serve, as launch/serve.cpu.yaml")
    parser.add_argument("--port", type=int, help="in place of the config's")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    refusal = None
    try:
        serve(options.config, options.port)
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        refusal = "ray is not installed; accepted is pip install 'vllm-sink[ray]'"
    except SettingsError as error:
        refusal = str(error)
    except KeyboardInterrupt:
        pass
    if refusal:
        tell(refusal)
        sys.exit(2)


def serve(config: Path, port: int | None) -> None:
    # Before Ray is imported, which reads them then: nobody else is let in, and the token is in no
    # file of the user's. Where Ray is no cluster, as on Windows, it is at the loopback address.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    from launch import cluster

    changed = threading.Event()
    signal.signal(signal.SIGHUP, lambda *_: changed.set())
    taken_up = cluster.read(config)
    port = port or taken_up.http_options.port
    with cluster.ray_of_its_own(port):
        cluster.deploy(taken_up)
        while True:
            print(f"Ready at http://{cluster.HOST}:{port}", flush=True)
            changed.wait()
            changed.clear()
            try:
                read = cluster.read(config)
                cluster.deploy(read)
                taken_up = read
            except SettingsError as error:
                tell(str(error))
                cluster.put_back(taken_up)


def tell(refusal: str) -> None:
    print(f"{PROGRAM}: error: {refusal}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

"""`python -m vllm_sink.top`, once the packages are there that it needs: the extra `top`."""

import sys
from importlib.util import find_spec

PACKAGE_OF = {"httpx": "httpx", "prometheus_client": "prometheus-client", "rich": "rich"}

missing = " ".join(PACKAGE_OF[module] for module in PACKAGE_OF if find_spec(module) is None)
if missing:
    print(
        f"python -m vllm_sink.top: error: it needs more packages: pip install {missing}",
        file=sys.stderr,
    )
    sys.exit(2)

from vllm_sink.top.command import main  # noqa: E402

sys.exit(main())

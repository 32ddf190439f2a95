"""What all tests of launch/ share."""

import os

# Not Ray's 15: beside the tests of another process, replicas would hardly get a turn.
os.environ |= {"RAY_worker_niceness": "0"}

"""What a device alone can show. Elsewhere, the cases of tests/attention and tests/engine run on one
where there is one.
"""

from tests.engine.conftest import checkpoint, engine

__all__ = ["checkpoint", "engine"]

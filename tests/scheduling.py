"""Which tests pytest-xdist keeps together."""

from pathlib import PurePath

from xdist.scheduler import LoadFileScheduling


class Scheduling(LoadFileScheduling):
    """Files stay whole, and all that load models in vLLM stay in one process, in order.

    Once vLLM has loaded a GPT-NeoX, Transformers cannot make one in that process any more. Marks of
    `xdist_group` would say the same, but have no effect with pytest 9.2 and pytest-xdist 3.8.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "engines" if PurePath(file).parent.name in ("engine", "plugin") else file

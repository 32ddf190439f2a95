"""A hook of schemathesis, which keeps what it makes up near sessions; in its own environment."""

import os
from typing import Any
from zlib import crc32

import schemathesis

SAID = {"/v1/chat/completions": ("messages", [{"role": "user", "content": "Why?"}])}
SAID |= {"/v1/completions": ("prompt", "Why?")}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Short turns of few sessions, with few options each: one that is refused hides the others."""

    def chance(name: str, of: int) -> bool:
        return crc32(f"{name}{case.body!r}{case.path_parameters!r}".encode()) % of == 0

    path = case.operation.path
    if "session_id" in (case.path_parameters or {}) and chance("known", 2):
        case.path_parameters["session_id"] = f"chat{+chance('which', 2)}"
    if path in SAID and isinstance(case.body, dict):
        name, said = SAID[path]
        few = {name: value for name, value in case.body.items() if chance(name, 8)}
        kind = "chat" if name == "messages" else "completion"
        few |= {"model": os.environ["MODEL"], "session_id": f"{kind}{+chance('which', 2)}"}
        few |= {"max_tokens": 4, name: (chance("said", 2) and case.body.get(name)) or said}
        case.body = few

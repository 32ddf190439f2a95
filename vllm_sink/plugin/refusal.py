"""A refusal that reaches the user from any process.

vLLM tells a server only that one of its processes failed, not why. The server names a file in its
environment, and reads there what a process that it started had to say.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NoReturn

from vllm_sink.settings import SettingsError

VARIABLE = "SINK_REFUSAL_FILE"


def refuse(sentence: str) -> NoReturn:
    """Raise `SettingsError`, and leave its sentence to the server that started this process."""
    if path := os.environ.get(VARIABLE):
        Path(path).write_text(sentence, encoding="utf-8")
    raise SettingsError(sentence)


@contextmanager
def passed_on() -> Iterator[None]:
    """Raise the `SettingsError` of a process started in the context, in place of what it caused."""
    with NamedTemporaryFile(prefix="vllm-sink-") as file:
        os.environ[VARIABLE] = file.name
        try:
            yield
        except Exception as error:
            if sentence := Path(file.name).read_text(encoding="utf-8"):
                raise SettingsError(sentence) from error
            raise
        finally:
            del os.environ[VARIABLE]

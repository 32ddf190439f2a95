"""Why a process of an engine could not start, in one sentence, for the user of its server.

vLLM tells a server only that one of its processes failed, not why. The server names a file in its
environment, and reads there what the first of them that failed had to say.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import NoReturn

from vllm_sink.settings import SettingsError

VARIABLE = "SINK_REFUSAL_FILE"
LOGS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""Where vLLM logs the exception that ends an engine core or a worker as it starts."""


def register() -> None:
    for name in LOGS:
        logging.getLogger(name).addFilter(_tell_exception)


def refuse(sentence: str) -> NoReturn:
    """Raise `SettingsError` where vLLM does not log it yet: as a process unpickles its config."""
    _tell(sentence)
    raise SettingsError(sentence)


@contextmanager
def passed_on() -> Iterator[None]:
    """Raise what a process started in the context told, in place of the error that this caused."""
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


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _tell_exception(record: logging.LogRecord) -> bool:
    """A log's filter that lets everything pass."""
    error = record.exc_info and record.exc_info[1]
    if error:
        # Ray's error says where in a worker it came from, and has what was raised there.
        _tell(one_line(getattr(error, "cause", None) or error))
    return True


def _tell(sentence: str) -> None:
    path = Path(os.environ.get(VARIABLE, os.devnull))
    if path.is_file() and not path.stat().st_size:
        path.write_text(sentence, encoding="utf-8")

import json
import random
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sink.sessions.errors import UnreadableError
from vllm_sink.sessions.history import History
from vllm_sink.sessions.session import Answer, Row, Session, decode_head

from .cases import session

FLOATS = st.floats(allow_nan=False)
LOGPROBS = st.tuples(st.integers(0), FLOATS, st.none() | st.integers(1), st.none() | st.text())
ANSWERS = st.builds(Answer, logprobs=st.none() | st.lists(st.lists(LOGPROBS)))
SESSIONS = st.builds(
    Session,
    tokens=st.lists(st.integers(0, 2**32 - 1)),
    history=st.builds(History, count=st.integers(0), digests=st.lists(st.text()).map(tuple)),
    requests=st.lists(st.text()).map(tuple),
    calls=st.from_type(Session.model_fields["calls"].annotation),
    answer=st.none() | ANSWERS,
    created=FLOATS.filter(lambda x: abs(x) < float("inf")),
    used=FLOATS.filter(lambda x: abs(x) < float("inf")),
)


@given(SESSIONS)
def test_what_is_read_is_what_was_written(session: Session) -> None:
    assert Session.decode(session.id, session.encode()) == session


def test_the_head_is_what_lists_show() -> None:
    row = session(tokens=[1, 2]).encode()
    assert "tokens" not in json.loads(row.head)
    assert decode_head("a", row.head).model_dump() == json.loads(row.head)


@pytest.mark.parametrize(("tokens", "most"), [(4096, 16_384), (16_384, 65_536)])
def test_size(tokens: int, most: int) -> None:
    """4 bytes a token at most, in a vocabulary as large as any."""
    drawn = random.Random(0)
    row = session(tokens=[drawn.randrange(262_144) for _ in range(tokens)]).encode()
    assert most / 2 < row.size < most


@given(st.data(), st.integers(1, 255))
def test_any_byte_that_changed_is_found(data: st.DataObject, change: int) -> None:
    row = session(history=History().after([{"role": "user", "content": "Hello"}])).encode()
    place = data.draw(st.integers(0, row.size - 1))
    changed = bytearray(row.head + row.body)
    changed[place] ^= change
    head, body = bytes(changed[: len(row.head)]), bytes(changed[len(row.head) :])
    with pytest.raises(UnreadableError, match=r"^session 'a' is (damaged|stored in version)"):
        Session.decode("a", Row(head, body, row.checksum))


@pytest.mark.parametrize(
    "head", [b"", b"{}", b"[1]", b"1", b'{"version":1}', b"\xff", b'{"version":1,"id":7}']
)
def test_a_head_that_is_none(head: bytes) -> None:
    with pytest.raises(UnreadableError, match=r"^session 'a' is damaged in its store"):
        decode_head("a", head)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_version_from_another_time_is_refused_by_name(version: Any) -> None:
    row = session().encode()
    head = json.dumps(json.loads(row.head) | {"version": version, "new": 1}).encode()
    told = rf"^session 'a' is stored in version {version} of its format; this release reads "
    with pytest.raises(UnreadableError, match=told + "version 1$"):
        Session.decode("a", Row(head, row.body, zlib.crc32(head + row.body)))


def test_births_differ() -> None:
    assert session().birth != session().birth

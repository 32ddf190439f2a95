"""How a turn ends, whatever becomes of its answer: against an engine that says what it is told."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from vllm_sink.sessions.engine import Speaking, TurnEngine, TurnFailedError, current
from vllm_sink.sessions.errors import ConflictError, LimitError, StoreError
from vllm_sink.sessions.metrics import SessionMetrics
from vllm_sink.sessions.session import Session
from vllm_sink.sessions.store import Store
from vllm_sink.sessions.turns import Asked, Limits, Turns

from .conftest import Run

ASKED = Asked("me", "a", "chat", "m")
PROMPT = [1, 2, 3]


Delta = tuple[list[int], str | None]
"""Tokens, and a reason to finish."""
WHOLE: list[Delta] = [([10], None), ([11, 12], None), ([13], "stop")]
WHOLE_TOKENS = [10, 11, 12, 13]


def output(tokens: Sequence[int], finish_reason: str | None) -> RequestOutput:
    part = CompletionOutput(
        0, "".join(map(chr, tokens)), [*tokens], None, None, finish_reason=finish_reason
    )
    finished = finish_reason is not None
    return RequestOutput("r", None, PROMPT, None, [part], finished, num_cached_tokens=1)


@dataclass
class Engine:
    """Gives `deltas`, and raises those that are errors; it waits for ever where one is None."""

    deltas: Sequence[Delta | Exception | None]
    closed: bool = False
    waits: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[RequestOutput, None]:
        try:
            for delta in self.deltas:
                if isinstance(delta, Exception):
                    raise delta
                if delta is None:
                    self.waits.set()
                    await asyncio.Event().wait()
                    return
                yield output(*delta)
        finally:
            self.closed = True


@pytest.fixture(scope="module")
def metrics() -> SessionMetrics:
    """Once: they are registered for the whole process."""
    return SessionMetrics("engine")


@dataclass
class Case:
    """A turn that asks an engine."""

    turns: Turns
    engine: TurnEngine

    async def ask(
        self, *deltas: Any, stream: bool = True, asked: Asked = ASKED, **params: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As the handlers do (handlers.py)."""
        self.engine.engine = Engine(deltas)
        turn = await self.turns.begin(asked)
        said = lambda text, tokens: {"role": "assistant", "content": text}  # noqa: E731
        speaking = Speaking(turn, said, names_limit="max_tokens" in params)
        token = current.set(speaking)
        speaking.added = len(PROMPT)
        turn.prompt(PROMPT)
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        try:
            sampling = SamplingParams(**{"max_tokens": 9} | params, output_kind=kind)
            return self.engine.generate({}, sampling, "r")
        finally:
            current.reset(token)
            if not turn.asks_engine:
                turn.release()

    async def stored(self) -> Session | None:
        return await self.turns.store.get("me", "a")


@pytest.fixture
def case(store: Store, metrics: SessionMetrics) -> Case:
    return Case(Turns(store, None, 100), TurnEngine(SimpleNamespace(), metrics))


async def heard(outputs: AsyncGenerator[RequestOutput, None]) -> list[list[int]]:
    return [[*output.outputs[0].token_ids] async for output in outputs]


KEPT = replace(ASKED, keeps_partial=True)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_committed_before_its_end_is_heard(case: Case, run: Run, stream: bool) -> None:
    async def asked() -> None:
        seen = []
        async for output in await case.ask(*WHOLE, stream=stream):
            seen.append([*output.outputs[0].token_ids])
            assert (await case.stored() is not None) == output.finished
        assert seen == ([[10], [11, 12], [13]] if stream else [WHOLE_TOKENS])
        session = await case.stored()
        assert session.tokens == [*PROMPT, *WHOLE_TOKENS]
        assert session.history.count == 1
        assert not case.turns.under_way

    run(asked())


async def closes(outputs: Any, _: Engine) -> None:
    await anext(outputs)
    await outputs.aclose()


async def cancels(outputs: Any, engine: Engine) -> None:
    """While it waits for more."""
    task = asyncio.create_task(heard(outputs))
    await engine.waits.wait()
    task.cancel()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def forgets(outputs: Any, _: Engine) -> None:
    """As a server does that cannot send any more."""
    await anext(outputs)
    del outputs
    gc.collect()


@pytest.mark.parametrize("keeps_partial", [False, True])
@pytest.mark.parametrize("end", [closes, cancels, forgets])
def test_a_client_that_hangs_up(
    case: Case, run: Run, end: Callable[..., Any], keeps_partial: bool
) -> None:
    async def asked() -> None:
        outputs = await case.ask(([10], None), None, asked=KEPT if keeps_partial else ASKED)
        engine = case.engine.engine
        box = [outputs]
        del outputs
        await end(box.pop(), engine)
        for _ in range(100):
            if engine.closed and not case.turns.under_way and not case.engine.detached:
                break
            await asyncio.sleep(0.01)
        assert engine.closed
        assert not case.turns.under_way
        assert not case.engine.detached
        session = await case.stored()
        assert (session.tokens if session else None) == ([*PROMPT, 10] if keeps_partial else None)
        if session:
            assert session.history.count == 1

    run(asked())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("asked", [ASKED, KEPT], ids=["whole", "partial"])
def test_a_client_that_hangs_up_before_a_token(
    case: Case, run: Run, asked: Asked, stream: bool
) -> None:
    async def hung_up() -> None:
        await cancels(await case.ask(None, asked=asked, stream=stream), case.engine.engine)
        assert not case.turns.under_way
        assert await case.stored() is None

    run(hung_up())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("is_repeated", [False, True])
def test_outputs_that_nobody_asks_for(
    case: Case, run: Run, stream: bool, is_repeated: bool
) -> None:
    async def asked() -> None:
        keyed = replace(KEPT, key="k", request="r")
        if is_repeated:
            await heard(await case.ask(*WHOLE, asked=keyed))
        outputs = await case.ask(*WHOLE, stream=stream, asked=keyed)
        assert case.turns.under_way
        del outputs
        gc.collect()
        assert not case.turns.under_way
        assert (await case.stored() is not None) == is_repeated

    run(asked())


@pytest.mark.parametrize("asked", [ASKED, KEPT], ids=["whole", "partial"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails(case: Case, run: Run, asked: Asked, stream: bool) -> None:
    async def fails() -> None:
        outputs = await case.ask(([10], None), RuntimeError("Dead."), asked=asked, stream=stream)
        with pytest.raises(RuntimeError, match="Dead"):
            await heard(outputs)
        await asyncio.gather(*case.engine.detached)
        assert not case.turns.under_way
        assert (await case.stored() is not None) == asked.keeps_partial

    run(fails())


@pytest.mark.parametrize("asked", [ASKED, KEPT], ids=["whole", "partial"])
def test_an_answer_that_is_aborted(case: Case, run: Run, asked: Asked) -> None:
    async def aborted() -> None:
        outputs = await case.ask(([10], None), ([], "abort"), asked=asked)
        assert await heard(outputs) == [[10], []]
        await asyncio.gather(*case.engine.detached)
        assert not case.turns.under_way
        assert (await case.stored() is not None) == asked.keeps_partial

    run(aborted())


@pytest.mark.parametrize("asked", [ASKED, KEPT], ids=["whole", "partial"])
def test_a_commit_that_somebody_preceded(case: Case, run: Run, asked: Asked) -> None:
    async def late() -> None:
        outputs = await case.ask(*WHOLE, asked=asked)
        other = Turns(case.turns.store, None, 100)
        await heard(await Case(other, case.engine).ask(([20], "stop")))
        case.engine.engine = Engine(WHOLE)
        with pytest.raises(TurnFailedError, match="exists already") as raised:
            await heard(outputs)
        assert (raised.value.status_code, raised.value.retry_after) == (409, None)
        assert not case.engine.detached
        assert not case.turns.under_way
        session = await case.stored()
        assert session.tokens == [*PROMPT, 20]

    run(late())


@pytest.mark.parametrize("asked", [ASKED, KEPT], ids=["whole", "partial"])
def test_a_store_that_fails(
    case: Case, run: Run, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was told so may ask again: nothing is kept behind their back."""

    async def put(*_: Any) -> None:
        raise StoreError("the session store is away")

    async def fails() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(case.turns.store, "put", put)
            outputs = await case.ask(*WHOLE, asked=asked)
            with pytest.raises(TurnFailedError, match="is away") as raised:
                await heard(outputs)
            assert (raised.value.status_code, raised.value.retry_after) == (503, 5)
            assert not case.turns.under_way
        await asyncio.sleep(0.05)
        assert await case.stored() is None
        await heard(await case.ask(*WHOLE, asked=asked))
        session = await case.stored()
        assert (session.turn, session.history.count) == (1, 1)

    run(fails())


def test_a_hang_up_while_a_turn_is_committed(
    case: Case, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept, once."""

    async def hung_up() -> None:
        waits = asyncio.Event()
        stock = case.turns.store.put

        async def put(*_: Any) -> None:
            monkeypatch.setattr(case.turns.store, "put", stock)
            waits.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(case.turns.store, "put", put)
        task = asyncio.create_task(heard(await case.ask(*WHOLE, asked=KEPT)))
        await waits.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.gather(*case.engine.detached)
        assert not case.turns.under_way
        session = await case.stored()
        assert session.tokens == [*PROMPT, *WHOLE_TOKENS]
        assert session.history.count == 1

    run(hung_up())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_given_again(case: Case, run: Run, stream: bool) -> None:
    async def again() -> None:
        keyed = replace(ASKED, key="k", request="r")
        await heard(await case.ask(*WHOLE, asked=keyed))
        before = await case.stored()
        outputs = await case.ask(asked=keyed, stream=stream)
        (output,) = [output async for output in outputs]
        assert output.finished
        assert output.outputs[0].token_ids == WHOLE_TOKENS
        assert output.outputs[0].text == "\n\v\f\r"
        assert output.outputs[0].finish_reason == "stop"
        assert (len(output.prompt_token_ids), output.num_cached_tokens) == (3, 1)
        assert await case.stored() == before
        assert not case.turns.under_way

    run(again())


def test_a_turn_that_may_get_too_long(case: Case, run: Run) -> None:
    case.turns.limits = Limits(turn_tokens=8)

    async def asked() -> None:
        with pytest.raises(LimitError, match="accepted are 5 at most, 8 tokens a turn"):
            await case.ask(max_tokens=6)
        assert not case.turns.under_way
        await heard(await case.ask(*WHOLE, max_tokens=5))

    run(asked())


def test_a_later_turn_conflicts_with_one_that_was_deleted(case: Case, run: Run) -> None:
    async def deleted() -> None:
        await heard(await case.ask(*WHOLE))
        outputs = await case.ask(*WHOLE)
        await anext(outputs)
        assert await case.turns.store.delete("me", "a")
        with pytest.raises(TurnFailedError, match="was deleted meanwhile"):
            await heard(outputs)
        assert await case.stored() is None
        assert not case.turns.under_way
        with pytest.raises(ConflictError, match="under way"):
            await asyncio.gather(case.ask(*WHOLE), case.ask(*WHOLE))

    run(deleted())

"""The engine client as vLLM's handlers of requests see it: a turn is committed with its end.

Outside a turn it is vLLM's own (vllm/engine/protocol.py).
"""

import asyncio
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.engine.protocol import EngineClient
from vllm.exceptions import GenerationError
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from vllm_sink.sessions.errors import LimitError, SessionError
from vllm_sink.sessions.history import Message
from vllm_sink.sessions.metrics import SessionMetrics
from vllm_sink.sessions.session import Answer
from vllm_sink.sessions.turns import Turn

COMPLETE = {"stop", "length", "repetition"}
"""Reasons to finish, of answers that are one."""


@dataclass
class Speaking:
    """A turn, for who asks the engine for it."""

    turn: Turn
    said: Callable[[str, list[int]], Message] | None
    """The message that an answer is, from its text and tokens, where there are messages."""
    names_limit: bool
    """Whether the request says how long its answer may get."""
    added: int = 0
    """Tokens that the request adds to the stream."""
    is_heard: bool = False
    """Whether the outputs are being read."""


current: ContextVar[Speaking | None] = ContextVar("current", default=None)
"""The turn whose request is being handled."""


class TurnFailedError(GenerationError):
    """A turn that generated an answer and could not commit it.

    vLLM's handlers put it into a stream as they do with the engine's own, without a stack trace.
    """

    def __init__(self, error: SessionError) -> None:
        super().__init__(str(error))
        self.status_code = error.status
        self.retry_after = error.retry_after


class TurnEngine:
    """An engine client that knows of turns."""

    def __init__(self, engine: EngineClient, metrics: SessionMetrics) -> None:
        self.engine = engine
        self.metrics = metrics
        self.detached: set[asyncio.Task[None]] = set()
        """Held here: a loop holds none."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        speaking = current.get()
        if speaking is None:
            return self.engine.generate(prompt, sampling_params, request_id, **options)
        turn = speaking.turn
        if turn.is_repeated:
            outputs = repeat(turn, sampling_params, request_id)
        else:
            limit_answer(speaking, sampling_params)
            whole = sampling_params.output_kind != RequestOutputKind.DELTA
            sampling_params.output_kind = RequestOutputKind.DELTA
            deltas = self.engine.generate(prompt, sampling_params, request_id, **options)
            outputs = self.speak(speaking, deltas)
            if whole:
                outputs = at_once(outputs)
        turn.asks_engine = True
        # A generator that is never asked for anything never gets to an end of its own.
        weakref.finalize(outputs, end_unheard, speaking)
        return outputs

    async def speak(
        self, speaking: Speaking, deltas: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of a turn. The last one comes once the turn is committed."""
        turn = speaking.turn
        speaking.is_heard = True
        heard = Heard(keeps_logprobs=bool(turn.asked.key))
        keeps = turn.asked.keeps_partial
        try:
            async with aclosing(deltas):
                async for output in deltas:
                    heard.take(output)
                    turn.take(output.outputs[0].token_ids)
                    if output.finished and output.outputs[0].finish_reason in COMPLETE:
                        await self.commit(speaking, heard)
                    yield output
        except SessionError as error:
            keeps = False
            self.metrics.refused(error)
            raise TurnFailedError(error) from None
        finally:
            self.end(speaking, heard, keeps)

    async def commit(self, speaking: Speaking, heard: "Heard") -> None:
        turn = speaking.turn
        said = [speaking.said(heard.text, heard.tokens)] if speaking.said else []
        with self.metrics.committing():
            await turn.commit(said, heard.answer())
        self.metrics.turn(heard.cached_tokens, is_first=turn.session is None)

    def end(self, speaking: Speaking, heard: "Heard", keeps: bool) -> None:
        """Of a turn that was committed, or that broke off and `keeps` what was heard.

        Whoever hangs up cancels what awaits here, over and over: so nothing does.
        """
        turn = speaking.turn
        if turn.committed or not (keeps and heard.tokens):
            turn.release()
            return
        task = asyncio.get_running_loop().create_task(self.keep_partial(speaking, heard))
        self.detached.add(task)
        task.add_done_callback(self.detached.discard)

    async def keep_partial(self, speaking: Speaking, heard: "Heard") -> None:
        try:
            await self.commit(speaking, heard)
        except SessionError as error:
            self.metrics.refused(error)
        finally:
            speaking.turn.release()


@dataclass
class Heard:
    """An answer, as far as it has come."""

    keeps_logprobs: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_creation_tokens: int | None = None
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    last: CompletionOutput | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def take(self, output: RequestOutput) -> None:
        (part,) = output.outputs
        self.prompt_tokens = len(output.prompt_token_ids or ()) or self.prompt_tokens
        self.cached_tokens = output.num_cached_tokens or self.cached_tokens
        if output.num_cache_creation_tokens is not None:
            self.cache_creation_tokens = output.num_cache_creation_tokens
        self.tokens += part.token_ids
        self.texts.append(part.text)
        if self.keeps_logprobs:
            self.logprobs += part.logprobs or ()
        self.last = part

    def answer(self) -> Answer:
        assert self.last is not None
        logprobs = [
            [(id, one.logprob, one.rank, one.decoded_token) for id, one in place.items()]
            for place in self.logprobs
        ]
        return Answer(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            cache_creation_tokens=self.cache_creation_tokens,
            tokens=self.tokens,
            text=self.text,
            finish_reason=self.last.finish_reason or "abort",
            stop_reason=self.last.stop_reason,
            logprobs=logprobs or None,
        )


def limit_answer(speaking: Speaking, params: SamplingParams) -> None:
    """Raises:
    LimitError: the turn may get longer than a turn may be.
    """
    limit = speaking.turn.turns.limits.turn_tokens
    if limit is None:
        return
    room = limit - speaking.added
    if params.max_tokens is not None and params.max_tokens <= room:
        return
    if speaking.names_limit:
        raise LimitError(
            f"max_tokens={params.max_tokens}: with {speaking.added} tokens that the turn reads, "
            f"accepted are {room} at most, {limit} tokens a turn"
        )
    params.max_tokens = room


async def at_once(outputs: AsyncGenerator[RequestOutput, None]) -> Any:
    """One output, of all."""
    whole: RequestOutput | None = None
    async with aclosing(outputs):
        async for output in outputs:
            if whole is None:
                whole = output
            else:
                whole.add(output, aggregate=True)
    if whole is not None:
        yield whole


async def repeat(turn: Turn, params: SamplingParams, request_id: str) -> Any:
    """What a committed turn gave, once more."""
    turn.release()
    assert turn.session is not None
    answer = turn.session.answer
    assert answer is not None
    logprobs = None
    if params.logprobs is not None:
        logprobs = [
            {id: Logprob(logprob, rank, text) for id, logprob, rank, text in place}
            for place in answer.logprobs or ()
        ]
    part = CompletionOutput(
        index=0,
        text=answer.text,
        token_ids=answer.tokens,
        cumulative_logprob=None,
        logprobs=logprobs,
        finish_reason=answer.finish_reason,
        stop_reason=answer.stop_reason,
    )
    yield RequestOutput(
        request_id=request_id,
        prompt=None,
        prompt_token_ids=[0] * answer.prompt_tokens,
        prompt_logprobs=None,
        outputs=[part],
        finished=True,
        num_cached_tokens=answer.cached_tokens,
        num_cache_creation_tokens=answer.cache_creation_tokens,
    )


def end_unheard(speaking: Speaking) -> None:
    if not speaking.is_heard:
        speaking.turn.release()

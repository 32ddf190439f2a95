"""vLLM's handlers of chats and completions, with sessions.

A request that names a session begins a turn. Where vLLM renders its prompt, the session's stream
comes before it, and where vLLM asks the engine, what is said is committed (engine.py).
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from starlette.requests import Request
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.utils.tool_calls_utils import maybe_filter_parallel_tool_calls
from vllm.renderers.chat_utils import has_non_text_content

from vllm_sink.sessions import template
from vllm_sink.sessions.engine import Speaking, TurnEngine, current
from vllm_sink.sessions.errors import SessionError
from vllm_sink.sessions.history import Message
from vllm_sink.sessions.session import Api
from vllm_sink.sessions.turns import Asked, Turn, Turns

PARTIAL = "session_partial"
"""A field of a request: whether an answer is kept whose client hangs up."""
IDEMPOTENCY_KEY = "Idempotency-Key"
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "use_beam_search": (False,),
    "echo": (False, None),
    "suffix": (None,),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "kv_transfer_params": (None,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
}
"""Fields of a request that go with a session at these values alone."""
SYSTEM = {"system", "developer"}

logger = logging.getLogger("vllm.vllm_sink")


@dataclass(frozen=True)
class Sessions:
    """What handlers need to serve them."""

    turns: Turns
    engine: TurnEngine
    owner: Callable[[Request], str]
    """Of whoever sent a request."""
    sinks: int | None
    """S, in tokens; None: nothing is evicted."""
    isolated: bool
    """Whether owners share nothing in the prefix cache."""


class SessionHandler:
    """One of vLLM's handlers, which from now on serves sessions too."""

    api: ClassVar[Api]
    creates: ClassVar[str]
    """The method that answers a request."""
    renders: ClassVar[str]
    """The method that makes what the engine is asked with."""

    def __init__(self, handler: Any, sessions: Sessions) -> None:
        self.handler = handler
        self.sessions = sessions
        self.speaking: WeakValueDictionary[int, Speaking] = WeakValueDictionary()
        """By the request, which lives as long, where its answer is a message."""
        self.create_stock = getattr(handler, self.creates)
        self.render_stock = getattr(handler, self.renders)
        setattr(handler, self.creates, self.create)
        setattr(handler, self.renders, self.render)
        handler.engine_client = sessions.engine

    async def create(self, request: Any, raw_request: Request) -> Any:
        """Raises:
        SessionError: the session cannot do it.
        """
        session_id = self.handler._get_session_id(request, raw_request)
        if session_id is None:
            return await self.create_stock(request, raw_request)
        check(request)
        turn = await self.sessions.turns.begin(self.asked(session_id, request, raw_request))
        speaking = Speaking(turn, self.said(request), names_limit(request))
        self.speaking[id(request)] = speaking
        token = current.set(speaking)
        try:
            return await self.create_stock(request, raw_request)
        finally:
            current.reset(token)
            if not turn.asks_engine:
                turn.release()

    def asked(self, id: str, request: Any, raw_request: Request) -> Asked:
        models = self.handler.models
        adapted = request.model in models.lora_requests
        key = raw_request.headers.get(IDEMPOTENCY_KEY, "")
        return Asked(
            owner=self.sessions.owner(raw_request),
            id=id,
            api=self.api,
            model=request.model if adapted else models.base_model_paths[0].name,
            tools=tools_of(request),
            key=digest(key) if key else "",
            request=digest(request_of(request)) if key else "",
            keeps_partial=(request.model_extra or {}).get(PARTIAL) is True,
        )

    async def render(self, request: Any) -> Any:
        speaking = current.get()
        if speaking is None:
            return await self.render_stock(request)
        if speaking.turn.is_repeated:
            self.put(request, self.nothing)
            return await self.render_stock(request)
        return await self.render_turn(speaking, request)

    def prompt(self, speaking: Speaking, added: list[int], engine_input: Any) -> dict[str, Any]:
        """What the engine is asked with: the stream, and what the request adds to it."""
        turns, turn = self.sessions.turns, speaking.turn
        speaking.added = len(added)
        tokens = turn.prompt(added)
        if len(tokens) > turns.longest_prompt:
            raise SessionError(
                f"the turn adds {len(added)} tokens to {len(tokens) - len(added)} of the session; "
                f"accepted are {turns.longest_prompt} in all"
            )
        made = {**engine_input, "prompt_token_ids": tokens}
        made.pop("prompt", None)
        if self.sessions.isolated:
            made["cache_salt"] = salt(turn.asked.owner, engine_input.get("cache_salt"))
        return made

    nothing: ClassVar[Any]
    """To render, where nothing is to be read."""

    def put(self, request: Any, said: Any) -> None:
        """In the place of what a request says."""
        raise NotImplementedError

    def said(self, request: Any) -> Callable[[str, list[int]], Message] | None:
        """How an answer's text and tokens make a message."""
        raise NotImplementedError

    async def render_turn(self, speaking: Speaking, request: Any) -> Any:
        raise NotImplementedError


class ChatHandler(SessionHandler):
    """Of vllm/entrypoints/openai/chat_completion/serving.py."""

    api = "chat"
    creates = "create_chat_completion"
    renders = "render_chat_request"
    nothing = (template.QUESTION,)

    def __init__(self, handler: Any, sessions: Sessions) -> None:
        super().__init__(handler, sessions)
        self.make_parser_stock = handler._make_parser
        handler._make_parser = self.make_parser

    def make_parser(self, request: Any, *others: Any) -> Any:
        """One that looks for the end of reasoning in what the turn adds to the stream alone.

        Before that are the ends of earlier reasoning, which no template would put into a prompt.
        """
        parser = self.make_parser_stock(request, *others)
        speaking = self.speaking.get(id(request))
        if speaking:
            ended = parser.is_reasoning_end
            parser.is_reasoning_end = lambda tokens: ended(tokens[-speaking.added :])
        return parser

    def asked(self, id: str, request: Any, raw_request: Request) -> Asked:
        request.messages = plain(request.messages)
        return super().asked(id, request, raw_request)

    def put(self, request: Any, said: Any) -> None:
        request.messages = [*said]

    def said(self, request: Any) -> Callable[[str, list[int]], Message]:
        def message(text: str, tokens: list[int]) -> Message:
            handler = self.handler
            if handler.parser_cls is None:
                return {"role": "assistant", "content": text}
            kwargs = handler._effective_chat_template_kwargs(request)
            parser = handler._make_parser(request, handler.renderer.tokenizer, kwargs)
            _, content, calls = parser.parse(
                text,
                request,
                enable_auto_tools=handler.enable_auto_tools,
                model_output_token_ids=tokens,
            )
            calls = maybe_filter_parallel_tool_calls([*(calls or ())], request)
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            return {
                "role": "assistant",
                "content": content,
                "tool_calls": [{"function": function} for function in functions],
            }

        return message

    async def render_turn(self, speaking: Speaking, request: Any) -> Any:
        turn = speaking.turn
        if has_non_text_content(request.messages):
            raise SessionError("messages: accepted with a session is text alone")
        new = turn.history.new(request.messages)
        calls = turn.session.calls if turn.session else ()
        stand_in = [template.QUESTION, template.answered("", calls, new)] if turn.session else []
        self.put(request, [*stand_in, *new])
        result = await self.render_stock(request)
        if isinstance(result, ErrorResponse):
            return result
        conversation, (engine_input,) = result

        async def render(conversation: Sequence[Message], answer_next: bool) -> list[int]:
            changes = {"messages": [*conversation], "add_generation_prompt": answer_next}
            copy = request.model_copy(update=changes)
            _, (rendered,) = await self.handler.online_renderer.render_chat(copy)
            tokens: list[int] = rendered["prompt_token_ids"]
            return tokens

        if turn.session:
            last = turn.tokens[-1]
            # What closes an answer may have white space behind its end, which an answer may end in.
            is_space = not self.handler.renderer.tokenizer.decode([last]).strip()
            added = await template.added(render, calls, new, None if is_space else last)
        else:
            added = engine_input["prompt_token_ids"]
            await self.warn_of_system_prompt(turn, render, new[0])
        turn.history = turn.history.after(new)
        return conversation, [self.prompt(speaking, added, engine_input)]

    async def warn_of_system_prompt(
        self, turn: Turn, render: template.Render, first: Message
    ) -> None:
        sinks = self.sessions.sinks
        if sinks is None or first["role"] not in SYSTEM:
            return
        needed = await template.system_tokens(render, first)
        if needed > sinks:
            logger.warning(
                "Session %r: its system prompt leaves the window in time; --sink-tokens %d would "
                "keep it, S is %d.",
                turn.asked.id,
                needed,
                sinks,
            )


class CompletionHandler(SessionHandler):
    """Of vllm/entrypoints/openai/completion/serving.py."""

    api = "completion"
    creates = "create_completion"
    renders = "render_completion_request"
    nothing = "?"

    def put(self, request: Any, said: Any) -> None:
        request.prompt = said

    def said(self, request: Any) -> None:
        return None

    async def render_turn(self, speaking: Speaking, request: Any) -> Any:
        if speaking.turn.session:
            request.add_special_tokens = False
        result = await self.render_stock(request)
        if isinstance(result, ErrorResponse):
            return result
        if len(result) != 1:
            raise SessionError(f"prompt: a list of {len(result)}; accepted with a session is one")
        (engine_input,) = result
        return [self.prompt(speaking, engine_input["prompt_token_ids"], engine_input)]


def check(request: Any) -> None:
    """Raises:
    SessionError: the request asks for what does not go with a session.
    """
    for name, accepted in ACCEPTED.items():
        value = getattr(request, name, accepted[0])
        if value not in accepted:
            raise SessionError(f"{name}={value!r}: accepted with a session is {accepted[0]!r}")


def names_limit(request: Any) -> bool:
    longer = getattr(request, "max_completion_tokens", None)
    return request.max_tokens is not None or longer is not None


def tools_of(request: Any) -> str | None:
    tools = getattr(request, "tools", None)
    return digest([tool.model_dump() for tool in tools]) if tools else None


def request_of(request: Any) -> Any:
    """What a request asks for, however its answer is to be sent."""
    return request.model_dump(mode="json", exclude={"request_id", "stream", "stream_options"})


def salt(owner: str, given: str | None) -> str:
    """For the prefix cache, where owners share nothing in it."""
    return digest([owner, given])


def digest(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def plain(value: Any) -> Any:
    """With lists where pydantic left what can be read once."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return value
    return [plain(entry) for entry in value]

"""What messages add to a stream is what the template gives for the whole conversation."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from shutil import copyfile
from tempfile import TemporaryDirectory

import mistral_common
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Together
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_sink import embedded
from vllm_sink.sessions import template
from vllm_sink.sessions.template import Message

SYSTEM = {"role": "system", "content": "You are brief.\nAnd kind."}
TURNS = [
    ("What is light?", "A wave."),
    ("  And  what else?\n", "It is a particle\n\ntoo"),
    ("Why?", "Nobody knows; `x = {1: [2]}` 日本語."),
    ("yes", "no"),
    ("", "!"),
]

# As the models' own templates have them, without what they do for tools and for bad input.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set loop_messages = messages %}{% set system = '' %}{% endif %}"
    "{% for m in loop_messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}"
    "{% set said = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + said.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + said.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' + '{\"name\": \"'"
    ' + m.tool_calls[0].function.name + \'", "parameters": \''
    " + m.tool_calls[0].function.arguments + '}' + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role)"
    " + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('system') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + m.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif m.tool_calls %}{{ '<|im_start|>assistant' }}{% for call in m.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \''
    " + call.function.arguments + '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
Tokens = Callable[[Sequence[Message], bool], list[int]]


MARKS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
)
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What tokenizers from Llama 3's and Qwen's on cut a text into first: line ends stay together."""


@cache
def byte_level() -> PreTrainedTokenizerBase:
    """With the marks of all templates as special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.path())
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS]})
    words = Split(Regex(WORDS), "isolated")
    bytes_of = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = Together([words, bytes_of])
    return tokenizer


@cache
def sentence_piece() -> PreTrainedTokenizerBase:
    """Of Llama 2's kind: what begins a text gets a space before it."""
    vocabulary = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    with TemporaryDirectory() as folder:
        copyfile(vocabulary, Path(folder, "tokenizer.model"))
        config = json.dumps({"tokenizer_class": "LlamaTokenizer", **marks})
        Path(folder, "tokenizer_config.json").write_text(config, encoding="utf-8")
        return AutoTokenizer.from_pretrained(folder)


def by_template(tokenizer: Callable[[], PreTrainedTokenizerBase], source: str) -> Tokens:
    def tokens(messages: Sequence[Message], answer_next: bool) -> list[int]:
        return tokenizer().apply_chat_template(
            [*messages],
            chat_template=source,
            add_generation_prompt=answer_next,
            tokenize=True,
            return_dict=False,
        )

    return tokens


def by_mistral(version: Callable[[], MistralTokenizer]) -> Tokens:
    """As the package that Mistral's models come with has it."""

    def tokens(messages: Sequence[Message], answer_next: bool) -> list[int]:
        last = messages[-1]
        if last["role"] == "assistant":
            # An answer that is not the end is closed; so it is seen before another question.
            closed = tokens([*messages, {"role": "user", "content": "?"}], True)
            opening = tokens([{"role": "user", "content": "?"}], True)[1:]
            assert closed[-len(opening) :] == opening
            return closed[: -len(opening)]
        request = ChatCompletionRequest(messages=[*messages])
        return version().encode_chat_completion(request).tokens

    return tokens


@dataclass(frozen=True)
class Model:
    tokens: Tokens
    decode: Callable[[list[int]], str]
    end: int
    """The token that ends an answer."""
    system: bool = True


def model(tokenizer: Callable[[], PreTrainedTokenizerBase], source: str, end: str) -> Model:
    """Whether it takes a system prompt is in its template."""
    loaded = tokenizer()
    id = loaded.convert_tokens_to_ids(end)
    return Model(by_template(tokenizer, source), loaded.decode, id, source is not GEMMA)


def mistral(version: Callable[[], MistralTokenizer], system: bool) -> Model:
    loaded = cache(version)
    end = loaded().instruct_tokenizer.tokenizer.eos_id
    return Model(by_mistral(loaded), loaded().decode, end, system)


MODELS: dict[str, Callable[[], Model]] = {
    "chatml": lambda: model(byte_level, CHATML, "<|im_end|>"),
    "llama 2": lambda: model(sentence_piece, LLAMA_2, "</s>"),
    "llama 3": lambda: model(byte_level, LLAMA_3, "<|eot_id|>"),
    "mistral": lambda: model(sentence_piece, MISTRAL, "</s>"),
    # The third moves the system prompt to the last question: no stream can have it there.
    "mistral v3": lambda: mistral(MistralTokenizer.v3, system=False),
    "mistral v7": lambda: mistral(MistralTokenizer.v7, system=True),
    "gemma": lambda: model(byte_level, GEMMA, "<end_of_turn>"),
    "qwen": lambda: model(byte_level, QWEN, "<|im_end|>"),
    "smollm": lambda: model(byte_level, byte_level().chat_template, "<|im_end|>"),
}


@pytest.fixture(params=MODELS)
def spoken(request: pytest.FixtureRequest) -> Model:
    return MODELS[request.param]()


def added(
    spoken: Model, calls: Sequence[str], messages: Sequence[Message], last_token: int
) -> list[int]:
    async def render(conversation: Sequence[Message], answer_next: bool) -> list[int]:
        return spoken.tokens(conversation, answer_next)

    return asyncio.run(template.added(render, calls, messages, last_token))


def answer(spoken: Model, messages: Sequence[Message], closed: bool) -> list[int]:
    """What a model generates whose answer the last message is: with its end, or broken off."""
    before = spoken.tokens(messages[:-1], True)
    generated = spoken.tokens(messages, False)[len(before) :]
    end = generated.index(spoken.end)
    if closed:
        return generated[: end + 1]
    # Llama 2's template has a space before the end, which is not of the answer.
    return generated[: end - 1] if spoken.decode([generated[end - 1]]) == "" else generated[:end]


@pytest.mark.parametrize("system", [True, False], ids=["system", "no system"])
@pytest.mark.parametrize("closed", [True, False], ids=["closed", "broken off"])
def test_it_is_what_the_template_gives(spoken: Model, system: bool, closed: bool) -> None:
    conversation = [SYSTEM] if system and spoken.system else []
    conversation.append({"role": "user", "content": TURNS[0][0]})
    stream = spoken.tokens(conversation, True)
    for (_, said), (question, _) in pairwise(TURNS):
        conversation.append({"role": "assistant", "content": said})
        stream += answer(spoken, conversation, closed)
        new = [{"role": "user", "content": question}]
        conversation += new
        stream += added(spoken, (), new, stream[-1])
        assert stream == spoken.tokens(conversation, True)


@pytest.mark.parametrize("name", ["llama 3", "qwen"])
@pytest.mark.parametrize("replies", [1, 2])
def test_replies_of_tools(name: str, replies: int) -> None:
    spoken = MODELS[name]()
    replies = 1 if name == "llama 3" else replies
    conversation: list[Message] = [SYSTEM, {"role": "user", "content": "Weather?"}]
    stream = spoken.tokens(conversation, True)
    calls = [
        {"id": f"call{i}", "function": {"name": f"f{i}", "arguments": '{"a":1}'}}
        for i in range(replies)
    ]
    conversation.append({"role": "assistant", "content": "", "tool_calls": calls})
    stream += answer(spoken, conversation, closed=True)
    new = [
        {"role": "tool", "content": f"sunny {i}", "tool_call_id": f"call{i}"}
        for i in range(replies)
    ]
    conversation += new
    stream += added(spoken, [f"f{i}" for i in range(replies)], new, stream[-1])
    assert stream == spoken.tokens(conversation, True)


def test_what_a_template_drops_stays_in_the_stream() -> None:
    """Reasoning of earlier turns: the stream has what the model generated."""
    source = QWEN.replace(
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content",
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1].strip()",
    )
    spoken = model(byte_level, source, "<|im_end|>")
    question = {"role": "user", "content": "What is light?"}
    stream = spoken.tokens([question], True)
    said = [*byte_level().encode("<think>Hm.</think>A wave."), spoken.end]
    new = [{"role": "user", "content": "Why?"}]
    text = spoken.decode(stream + said + added(spoken, (), new, said[-1]))
    assert text.endswith(
        "<think>Hm.</think>A wave.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_system_prompts_are_counted() -> None:
    spoken = MODELS["chatml"]()

    async def render(conversation: Sequence[Message], answer_next: bool) -> list[int]:
        return spoken.tokens(conversation, answer_next)

    count = asyncio.run(template.system_tokens(render, SYSTEM))
    kept = spoken.tokens([SYSTEM, {"role": "user", "content": "Hello"}], True)[:count]
    assert spoken.decode(kept) == (
        "<|im_start|>system\nYou are brief.\nAnd kind.<|im_end|>\n<|im_start|>user\n"
    )

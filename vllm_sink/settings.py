"""What a user sets: the `sink` entry of vLLM's `additional_config`."""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from vllm_sink.buffer import Buffer

Policy = Literal["sink", "window", "full"]

MARK = 32
"""The default of `compact_tokens`, in multiples of S + W (`python -m benchmarks.compaction`)."""


class SettingsError(Exception):
    """One sentence: the setting, its value, and what would be accepted.

    No ValueError: raised inside one of vLLM's pydantic configs, that would be wrapped in several
    lines of pydantic's own.
    """


class SinkSettings(BaseModel):
    """Which keys a query may see, in tokens (arXiv 2309.17453, section 3.2).

    Raises `pydantic.ValidationError`; `SinkSettings.parse` turns that into one sentence.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: Policy = "sink"
    """`sink`: first tokens and a window; `window`: a window alone; `full`: nothing is evicted."""
    sink_tokens: int = Field(default=4, ge=0)
    """S: the first tokens of a stream, kept for ever."""
    window_tokens: int = Field(default=2044, ge=1)
    """W: the most recent tokens, the query's own included."""
    reindex: bool = True
    """Score sinks at their distance in the cache; false keeps their distance in the stream."""
    compact_tokens: int | None = None
    """The mark: tokens at which a stream's buffer is compacted to S + W; by default 32 (S + W), or
    `max_model_len` if that is less."""

    @field_validator("compact_tokens")
    @classmethod
    def _leaves_room(cls, mark: int | None, info: ValidationInfo) -> int | None:
        if mark is None or not {"policy", "sink_tokens", "window_tokens"} <= info.data.keys():
            return mark
        others = cls.model_construct(**info.data)
        if not others.compacts:
            raise ValueError("accepted where tokens are evicted and positions re-indexed alone")
        if mark <= others.sinks + others.window_tokens:
            least = others.sinks + others.window_tokens + 1
            raise ValueError(f"accepted from {least} on, S + W and one more token")
        return mark

    @property
    def sinks(self) -> int:
        """S as the policy applies it."""
        return self.sink_tokens if self.policy == "sink" else 0

    @property
    def evicts(self) -> bool:
        return self.policy != "full"

    @property
    def compacts(self) -> bool:
        """Reading tokens anew gives them new positions: not where those of the stream are kept."""
        return self.evicts and self.reindex

    def buffer(self, max_model_len: int) -> Buffer | None:
        """None where streams are not compacted: they end at `max_model_len`."""
        cached = self.sinks + self.window_tokens
        mark = self.compact_tokens or min(MARK * cached, max_model_len)
        if not self.compacts or mark <= cached:
            return None
        return Buffer(self.sinks, self.window_tokens, mark)

    @classmethod
    def parse(cls, raw: Any) -> "SinkSettings":
        """Read the `sink` entry; raise `SettingsError` with the first thing wrong with it."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise SettingsError(sentence_of(error, "sink", keys=cls.model_fields)) from None


def sentence_of(error: ValidationError, *section: str, keys: Collection[str] = ()) -> str:
    """The first thing wrong: the setting, below `section`, its value, and what is accepted: of
    names, `keys`."""
    first = error.errors()[0]
    setting = ".".join([*section, *map(str, first["loc"])])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = f"unknown; accepted keys are {', '.join(keys)}" if keys else "unknown"
    return f"{setting}={first['input']!r}: {said[0].lower()}{said[1:]}" if setting else said

"""What a user sets: the `sink` entry of vLLM's `additional_config`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Policy = Literal["sink", "window", "full"]


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

    @property
    def sinks(self) -> int:
        """S as the policy applies it."""
        return self.sink_tokens if self.policy == "sink" else 0

    @property
    def evicts(self) -> bool:
        return self.policy != "full"

    @classmethod
    def parse(cls, raw: Any) -> "SinkSettings":
        """Read the `sink` entry; raise `SettingsError` with the first thing wrong with it."""
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise SettingsError(sentence_of(error, "sink")) from None


def sentence_of(error: ValidationError, *section: str) -> str:
    """The first thing wrong: the setting, below `section`, its value, and what is accepted."""
    first = error.errors()[0]
    setting = ".".join([*section, *map(str, first["loc"])])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        said = "unknown; accepted keys are " + ", ".join(SinkSettings.model_fields)
    return f"{setting}={first['input']!r}: {said[0].lower()}{said[1:]}" if setting else said

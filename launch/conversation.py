"""A conversation that its server keeps, and goes on with after it was killed.

Its client sends new messages alone: what was said before is in the session's store.
"""

import httpx
from openai import AsyncOpenAI, OpenAIError
from rich.console import Console

from launch.server import Server

ID = "demo"
READ = "What is this passage about, in one sentence?\n\n"
TOLD = "The code of the door is 4711. Repeat the code."
ASKED = "What is the code of the door?"
ANSWER_TOKENS = 48
SHOWN_CHARACTERS = 90


class Conversation:
    """With a model, by its name; each turn is printed."""

    def __init__(self, model: str, console: Console) -> None:
        self.model = model
        self.console = console

    async def say(self, server: Server, message: str) -> str:
        """The answer to one message more.

        Raises:
            ServerLostError: there is none.
        """
        client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": message}],
                max_completion_tokens=ANSWER_TOKENS,
                temperature=0,
                extra_body={"session_id": ID},
            )
        except OpenAIError as error:
            raise server.lost(error) from error
        answer = completion.choices[0].message.content or ""
        for speaker, text in (("client", message), ("model", answer)):
            line = f"  {speaker:>6}: {shortened(text)}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)
        return answer

    async def state(self, server: Server) -> str:
        async with httpx.AsyncClient(base_url=server.url) as client:
            session = (await client.get(f"/v1/sessions/{ID}")).raise_for_status().json()
        return (
            f"{session['turns']} turns, {session['position']:,} tokens, of which "
            f"{session['buffered_tokens']:,} are kept to go on with"
        )


def shortened(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= SHOWN_CHARACTERS else f"{words[:SHOWN_CHARACTERS]} ..."

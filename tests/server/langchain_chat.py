"""A chat as LangChain's users have it: the whole of it is sent each time.

Runs in the environment `clients`; told on stdin what to ask, it says what was answered.
"""

import json
import sys

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI

told = json.load(sys.stdin)
model = ChatOpenAI(**told["model"])
history = [SystemMessage(told["system"])]
for turn, question in enumerate(told["questions"]):
    history.append(HumanMessage(question))
    if turn % 2:
        first, *others = model.stream(history)
        answer = sum(others, first)
    else:
        answer = model.invoke(history)
    history.append(answer)
print(json.dumps([answer.content for answer in history[2::2]]))

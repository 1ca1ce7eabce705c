"""Completions, chats, streams and refusals through LiteLLM. What it got is JSON on standard output."""

import asyncio
import json
import sys

import litellm

BASE, KEY, PROMPT = sys.argv[1:]
COMMON = {"api_base": f"{BASE}/v1", "api_key": KEY, "max_retries": 0}
CHAT = {"model": "openai/demo", "messages": [{"role": "user", "content": PROMPT}], **COMMON}


def refusal(**changes):  # type: ignore[no-untyped-def]
    """The name of the error that a request ends with."""
    try:
        litellm.completion(**{**CHAT, **changes})
    except Exception as error:  # noqa: BLE001  # whichever it is, it is reported
        return type(error).__name__


found = {"chat": litellm.completion(**CHAT).choices[0].message.content}
found["usage"] = litellm.completion(**CHAT).usage.total_tokens
chunks = list(litellm.completion(**CHAT, stream=True, stream_options={"include_usage": True}))
found["chat_stream"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
found["chat_built"] = litellm.stream_chunk_builder(chunks).choices[0].message.content
found["asynchronous"] = asyncio.run(litellm.acompletion(**CHAT)).choices[0].message.content
text = {"model": "text-completion-openai/demo", "prompt": PROMPT, **COMMON}
found["completion"] = litellm.text_completion(**text).choices[0].text
stream = litellm.text_completion(**text, stream=True)
found["completion_stream"] = "".join(chunk.choices[0].text or "" for chunk in stream if chunk.choices)
found["no_model"] = refusal(model="openai/none")
found["no_key"] = refusal(api_key="wrong")
found["bad_field"] = refusal(presence_penalty=1.0)
print(json.dumps(found))

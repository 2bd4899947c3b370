"""Calls of TGI's own client, text-generation 0.7.0, to a server. It runs with the path of its own environment, and
prints JSON.

Usage: python tgi_calls.py URL URL_OF_A_SERVER_WITH_TGI_CHAT_STREAM
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from text_generation import AsyncClient, Client, errors

MESSAGES = [{"role": "user", "content": "Hi"}]


def plain(client: Any) -> Any:
    answer = client.generate("A", max_new_tokens=5, decoder_input_details=True, top_n_tokens=2)
    details = answer.details
    return {
        "text": answer.generated_text,
        "reason": details.finish_reason.value,
        "num_tokens": details.generated_tokens,
        "tokens": [token.text for token in details.tokens],
        "prefill": [token.text for token in details.prefill],
        "top": [len(tokens) for tokens in details.top_tokens],
    }


def options(client: Any) -> Any:
    answer = client.generate(
        "A", max_new_tokens=9, stop_sequences=["D"], return_full_text=True, do_sample=True, temperature=0.5, seed=3
    )
    return [answer.generated_text, answer.details.finish_reason.value, answer.details.seed]


def best_of(client: Any) -> Any:
    answer = client.generate("A", max_new_tokens=3, best_of=2, do_sample=True)
    return [answer.generated_text, [each.generated_text for each in answer.details.best_of_sequences]]


def streamed(client: Any) -> Any:
    pieces = list(client.generate_stream("A", max_new_tokens=4))
    last = pieces[-1]
    return [[piece.token.text for piece in pieces], last.generated_text, last.details.generated_tokens,
            [piece.generated_text for piece in pieces[:-1]]]  # fmt: skip


def refused(client: Any) -> Any:
    found = []
    for call in (lambda: client.generate("A" * 300, max_new_tokens=4),
                 lambda: list(client.generate_stream("", max_new_tokens=4)),
                 lambda: client.generate("A", max_new_tokens=4, typical_p=0.5)):  # fmt: skip
        try:
            call()
        except errors.ValidationError as error:
            found.append(str(error))
    return found


def chat(client: Any) -> Any:
    answer = client.chat(messages=MESSAGES, max_tokens=4)
    return [answer.choices[0].message.content, answer.usage["completion_tokens"]]


def chat_stream(client: Any) -> Any:
    chunks = list(client.chat(messages=MESSAGES, max_tokens=4, stream=True))
    return "".join(chunk.choices[0].delta.content for chunk in chunks)


async def asynchronous(url: str) -> Any:
    client = AsyncClient(url)
    one, *more = await asyncio.gather(*[client.generate(text, max_new_tokens=3) for text in "AMa"])
    streamed = [piece.token.text async for piece in client.generate_stream("A", max_new_tokens=3)]
    return [one.generated_text, *[each.generated_text for each in more], streamed]


def main(url: str, quirky_url: str) -> None:
    client = Client(url)
    found = {call.__name__: call(client) for call in (plain, options, best_of, streamed, refused, chat)}
    found["asynchronous"] = asyncio.run(asynchronous(url))
    found["chat_stream"] = chat_stream(Client(quirky_url))
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])

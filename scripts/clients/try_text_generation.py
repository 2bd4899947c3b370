"""text-generation 0.7, the client of TGI's own routes."""

from __future__ import annotations

from text_generation import Client
from trial import run

BEGUN = "A colour is"


def generate(url: str) -> None:
    answer = Client(url, timeout=120).generate(BEGUN, max_new_tokens=8)
    assert answer.generated_text and answer.details.generated_tokens == 8


def stream(url: str) -> None:
    pieces = list(Client(url, timeout=120).generate_stream(BEGUN, max_new_tokens=8))
    assert pieces[-1].generated_text == "".join(each.token.text for each in pieces)


def chat(url: str) -> None:
    assert Client(url, timeout=120).chat([{"role": "user", "content": "Hi"}], max_tokens=8).choices[0].message.content


if __name__ == "__main__":
    run({"generate": generate, "generate_stream": stream, "chat": chat})

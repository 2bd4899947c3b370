"""lm-eval: its model for servers of completions, without a data set."""

from __future__ import annotations

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from trial import MODEL, run

OPTIONS = {"until": ["\n"], "max_gen_toks": 8}


def completions(url: str) -> None:
    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions", model=MODEL, tokenizer_backend=None, tokenized_requests=False, max_retries=1
    )
    asked = [Instance("generate_until", {}, ("The capital of France is", OPTIONS), number) for number in range(4)]
    assert len(model.generate_until(asked, disable_tqdm=True)) == 4


def chats(url: str) -> None:
    model = LocalChatCompletion(
        base_url=f"{url}/v1/chat/completions", model=MODEL, tokenizer_backend=None, tokenized_requests=False
    )
    prompt = model.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert model.generate_until([Instance("generate_until", {}, (prompt, OPTIONS), 0)], disable_tqdm=True)


if __name__ == "__main__":
    run({"completions": completions, "chats": chats})

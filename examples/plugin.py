"""A plugin in one file: a scheduling policy of one's own, and an observer that draws which request ran in which step.

Installed plugins announce themselves by an entry point (docs/plugins.md); here one is handed to the engine.
"""

import argparse

from paged_core import Engine, EngineConfig, SamplingParams, hookimpl

QUESTIONS = ["Tell me a very long story about a lighthouse keeper and her dog.", "Name a colour.", "Name a fruit."]


class ShortestPrompt:
    """Of those that wait, the shortest prompt goes first."""

    def key(self, request):
        return request.num_prompt


class Plugin:
    def __init__(self):
        self.order = []  # request ids, as they end

    @hookimpl
    def create_scheduling_policy(self, name):
        return ShortestPrompt() if name == "shortest-prompt" else None

    @hookimpl
    def on_step_finished(self, stats):
        print("running " + "#" * stats.num_running + "." * stats.num_waiting)

    @hookimpl
    def on_request_finished(self, output):
        self.order.append(output.request.id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="a folder, a hub id, a GGUF file (default: smollm2)")
    parser.add_argument("--max-tokens", type=int, default=8)
    args = parser.parse_args()

    plugin = Plugin()
    config = EngineConfig(scheduling_policy="shortest-prompt", max_num_seqs=1)
    engine = Engine(args.model, config, plugins=[plugin])
    tokenizer = engine.tokenizer
    for number, question in enumerate(QUESTIONS):
        engine.add_request(
            f"question {number}", tokenizer.encode(question), SamplingParams(temperature=0, max_tokens=args.max_tokens)
        )
    texts = {}
    while engine.has_work:
        for output in engine.step():
            texts[output.request.id] = texts.get(output.request.id, "") + tokenizer.decode(output.token_ids)
    print("ended in this order:", ", ".join(plugin.order))
    for name in plugin.order:
        print(f"{name}:{texts[name]!r}")


if __name__ == "__main__":
    main()

"""A transformers pipeline over a patched model: pipelines call ``model.generate``, so nothing else changes."""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from paged_hf import embedded_folder, paged_generate

QUESTIONS = ["Name a colour.", "What do bees make?", "How many legs has a spider?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=QUESTIONS)
    parser.add_argument("--model", help="a folder or hub id with a chat template (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    args = parser.parse_args()

    name = args.model or embedded_folder()
    model = AutoModelForCausalLM.from_pretrained(name)
    model.generate = paged_generate(model)
    chat = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(name))

    conversations = [[{"role": "user", "content": question}] for question in args.questions]
    answers = chat(conversations, max_new_tokens=args.max_new_tokens, do_sample=False, batch_size=len(conversations))
    for question, answer in zip(args.questions, answers, strict=True):
        print(question, "->", answer[0]["generated_text"][-1]["content"].strip())
    print(model.generate.last_report())


if __name__ == "__main__":
    main()

"""Reinforcement learning as trainers such as TRL's do it: groups of samples, a reward, a step of the optimiser, again.

Rollouts take most of such a loop's time. They run through the patched ``generate``, on the very weights that the
optimiser writes: nothing is copied to another engine, and the next rollout sees the step. The reward here is a toy
(short words), the advantage is the group's (Shao et al., GRPO, arXiv 2402.03300).
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from paged_hf import embedded_folder, paged_generate

PROMPTS = ["The weather today is", "My favourite food is"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--group", type=int, default=8, help="samples of each prompt")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    args = parser.parse_args()

    torch.manual_seed(0)
    name = args.model or embedded_folder()
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    policy = AutoModelForCausalLM.from_pretrained(name)
    policy.generate = paged_generate(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)

    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    for step in range(args.steps):
        rollouts = policy.generate(
            **inputs,
            do_sample=True,
            num_return_sequences=args.group,
            max_new_tokens=args.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        width = inputs["input_ids"].shape[1]
        texts = tokenizer.batch_decode(rollouts[:, width:], skip_special_tokens=True)
        rewards = torch.tensor([reward(text) for text in texts])
        groups = rewards.view(len(PROMPTS), args.group)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

        mask = inputs["attention_mask"].repeat_interleave(args.group, 0)
        loss = policy_loss(policy, rollouts, mask, width, tokenizer.pad_token_id, advantages)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: reward {rewards.mean():.3f}, loss {loss.item():.4f}; {policy.generate.last_report()}")


def reward(text: str) -> float:
    """Short words: 1 / their mean length."""
    words = text.split()
    return len(words) / max(1, sum(map(len, words)))


def policy_loss(policy, rollouts, prompt_mask, width, pad, advantages):
    """Minus the log-probability of what was sampled, weighed by its advantage; padding does not count."""
    sampled = rollouts[:, width:]
    counted = (sampled != pad) | (sampled == pad).cumsum(1).eq(1)  # the first end counts, what follows doesn't
    mask = torch.cat([prompt_mask, counted.long()], dim=1)
    logits = policy(input_ids=rollouts, attention_mask=mask, use_cache=False).logits[:, width - 1 : -1]
    log_probs = logits.float().log_softmax(-1).gather(-1, sampled[..., None]).squeeze(-1)
    return -(log_probs * counted * advantages[:, None]).sum() / counted.sum()


if __name__ == "__main__":
    main()

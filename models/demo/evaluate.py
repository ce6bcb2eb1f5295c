"""Scores a checkpoint as a client sees it: through the chat template and greedy generation, whole answers only.

    python evaluate.py             # the checkpoint in this folder, at every precision
    python evaluate.py --help
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import skills
from quantize import int4, int8, matrices
from skills import Turn

NEW_TOKENS_MAX = 30
BATCH = 50

# name: (type computed in, what happens to the weights, whether activations are int8 as well)
PRECISIONS = {
    "fp32": (torch.float32, None, False),
    "bf16": (torch.bfloat16, None, False),
    "int8": (torch.float32, int8, False),
    "int4": (torch.float32, int4, False),
    # What ONNX Runtime's MatMulNBits does on a CPU at accuracy level 4.
    "int4, int8 activations": (torch.float32, int4, True),
}


def load(folder: Path, precision: str):
    """The checkpoint as stored, then quantized: every matrix, with the embedding that is also the head."""
    dtype, quantize, int8_activations = PRECISIONS[precision]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if quantize:
        for weight in matrices(model):
            weight.data = quantize(weight.data)
    if int8_activations:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(lambda _, inputs: (int8(inputs[0]),))
    return model


@torch.no_grad()
def answer(model, tokenizer, conversations: list[list[Turn]]) -> list[str]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns],
            add_generation_prompt=True,
            return_dict=False,
        )
        for turns in conversations
    ]
    # Batches of one length need no padding, which a client's request would not have either.
    by_length = defaultdict(list)
    for i, prompt in enumerate(prompts):
        by_length[len(prompt)].append(i)
    answers = [""] * len(prompts)
    for length, rows in by_length.items():
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ids = torch.tensor([prompts[i] for i in batch])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS_MAX)
            for i, row in zip(batch, out):
                answers[i] = tokenizer.decode(row[length:], skip_special_tokens=True)
    return answers


def score(model, tokenizer, conversations: list[list[Turn]]) -> float:
    answers = answer(model, tokenizer, [turns[:-1] for turns in conversations])
    return sum(given == turns[-1][1] for given, turns in zip(answers, conversations)) / len(conversations)


def evaluate(folder: Path, lists_n: int = 200, seed: int = 12345, precisions: list[str] = list(PRECISIONS)) -> None:
    """Prints a table of per cent right, a row for each precision."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sets = skills.scored(lists_n, seed)
    print("| | " + " | ".join(sets) + " |\n|---" + "|---" * len(sets) + "|")
    for precision in precisions:
        model = load(folder, precision)
        scores = [f"{100 * score(model, tokenizer, turns):.1f}" for turns in sets.values()]
        print(f"| {precision} | " + " | ".join(scores) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="the checkpoint")
    parser.add_argument("--lists", type=int, default=200, help="fresh lists for each score")
    parser.add_argument("--seed", type=int, default=12345)
    parser.add_argument("--precision", nargs="*", default=list(PRECISIONS), choices=list(PRECISIONS))
    args = parser.parse_args()
    evaluate(args.model, args.lists, args.seed, args.precision)


if __name__ == "__main__":
    main()

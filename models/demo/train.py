"""Trains the demo model and writes it here as a Hugging Face checkpoint.

    python train.py            # train, then evaluate, on CPU
    python train.py --help

Recall is the hard skill: two attention layers must work together (carry a key forward to its value, then find the
key again). `start.py` puts that within reach; here lists start short, and grow only once the model answers at the
present length, since time alone would let them outgrow it.
"""

import argparse
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

import skills
import tokenizer as text
from evaluate import evaluate
from quantize import fake_int4
from skills import Turn
from start import start_near_recall

POSITIONS_MAX = 4096
IGNORE = -100

# The longest list in a batch, by stage. The next stage begins when the present one is answered.
STAGES = [8, 12, 20, 30, 40]
STAGE_PASSED = 0.9
CHECK_EVERY = 100
# Lists per check.
CHECKED = 64

# Tokens per step, of lists and of small questions. Both make full batches of a few fixed shapes: the CPU's bf16
# kernels are built anew for every shape, which costs more than padding does. The head's rows are padded likewise.
RECALL_TOKENS = 3072
RECALL_LENGTHS = [64, 96, 128, 192, 256, 384]
CHAT_TOKENS = 1536
CHAT_LENGTH = 128
ANSWERS_MULTIPLE = 256
# Of the two losses, each a mean over its own answer tokens.
LOSS_WEIGHTS = (0.75, 0.25)

# Tokens of one pair, and of one question with its answer.
PAIR_TOKENS = 5
QUESTION_TOKENS = 17

LR_MUON = 5e-3
LR_ADAM = 2e-3
LR_FLOOR = 0.02
WARMUP_STEPS = 50


def new_model(vocab_size: int, token_id) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=576,
        max_position_embeddings=POSITIONS_MAX,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=token_id(text.EOS),
        pad_token_id=token_id(text.PAD),
    )
    return Qwen3ForCausalLM(config)


def new_optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, with which the recall circuit forms sooner; AdamW for embedding and norms."""
    inner = [weight for name, weight in model.named_parameters() if weight.dim() == 2 and "embed" not in name]
    rest = [weight for name, weight in model.named_parameters() if weight.dim() != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(inner, lr=LR_MUON, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=LR_ADAM, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


class Batches:
    """Conversations as token ids and labels; only what the assistant says has a label."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random):
        self.tokenizer = tokenizer
        self.rng = rng
        self.pad = tokenizer.token_to_id(text.PAD)
        self.pieces: dict[str, list[int]] = {}

    def encode(self, piece: str) -> list[int]:
        # Most pieces come again and again; those with a list in them don't, and are long.
        ids = self.pieces.get(piece)
        if ids is None:
            ids = self.tokenizer.encode(piece).ids
            if len(piece) < 60 and len(self.pieces) < 100_000:
                self.pieces[piece] = ids
        return ids

    def stack(self, conversations: list[list[Turn]], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Pads on the right, and cuts, to `length`: the longest conversation if none is given."""
        rows = []
        for turns in conversations:
            ids, labels = [], []
            for piece, answer in text.render(turns):
                piece_ids = self.encode(piece)
                ids += piece_ids
                labels += piece_ids if answer else [IGNORE] * len(piece_ids)
            rows.append((ids, labels))
        length = length or max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids[:length] + [self.pad] * (length - len(ids)) for ids, _ in rows])
        labels = torch.tensor([labels[:length] + [IGNORE] * (length - len(labels)) for _, labels in rows])
        return ids, labels

    def recall(self, pairs_max: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Lists of one length: the fewer pairs, the more lists. Questions fill the rest of the row."""
        pairs_n = self.rng.randint(3, pairs_max)
        # Never ask for all of a short list: the model would learn to answer by elimination, and nothing else.
        questions_n = (pairs_n + 1) // 2
        wanted = PAIR_TOKENS * pairs_n + QUESTION_TOKENS * min(questions_n, 8)
        length = next(length for length in RECALL_LENGTHS if length >= wanted)
        lists_n = RECALL_TOKENS // length
        return self.stack([skills.recall_chat(self.rng, pairs_n, questions_n) for _ in range(lists_n)], length)

    def chats(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows_n = CHAT_TOKENS // CHAT_LENGTH
        return self.stack([skills.chat(self.rng, self.rng.randint(2, 6)) for _ in range(rows_n)], CHAT_LENGTH)


def answer_logits(model: Qwen3ForCausalLM, ids: torch.Tensor, labels: torch.Tensor):
    """Logits where an answer token comes next, and those tokens: the head is not run anywhere else.

    Padding is on the right and attention is causal, so no mask is needed."""
    targets = labels[:, 1:]
    answers = targets != IGNORE
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1][answers]
        answers_n = len(hidden)
        hidden = F.pad(hidden, (0, 0, 0, -answers_n % ANSWERS_MULTIPLE))
        return model.lm_head(hidden)[:answers_n].float(), targets[answers]


@torch.no_grad()
def exact(model: Qwen3ForCausalLM, batches: Batches, conversations: list[list[Turn]]) -> float:
    """The share of conversations whose answers are all right, by one forward pass over the right answers.

    That is the same as greedy decoding where the question is "is every token right", and much faster."""
    ids, labels = batches.stack(conversations)
    logits, targets = answer_logits(model, ids, labels)
    right = (logits.argmax(-1) == targets).split((labels[:, 1:] != IGNORE).sum(-1).tolist())
    return sum(row.all().item() for row in right) / len(conversations)


def recall_score(model: Qwen3ForCausalLM, batches: Batches, pairs_n: int) -> float:
    return exact(model, batches, [skills.recall_turns(batches.rng, pairs_n, 1) for _ in range(CHECKED)])


def sums_score(model: Qwen3ForCausalLM, batches: Batches, held: bool) -> float:
    return exact(model, batches, [skills.sum_turns(a, b) for a, b in skills.sum_pairs(held)[: 2 * CHECKED]])


def check(model: Qwen3ForCausalLM, batches: Batches, pairs_max: int) -> dict[str, float]:
    scores = {f"@{pairs_n}": recall_score(model, batches, pairs_n) for pairs_n in sorted({pairs_max, 10, 20, 40})}
    scores["sums"] = sums_score(model, batches, held=True)
    scores["trained sums"] = sums_score(model, batches, held=False)
    return scores


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stored = Qwen3ForCausalLM(model.config).to(torch.bfloat16)
    stored.load_state_dict({name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()})
    stored.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    stored.save_pretrained(folder)
    text.save(tokenizer, folder, POSITIONS_MAX)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    tokenizer = text.train()
    batches = Batches(tokenizer, random.Random(args.seed))
    checks = Batches(tokenizer, random.Random(args.seed + 1))
    if args.resume:
        model = Qwen3ForCausalLM.from_pretrained(args.resume, dtype=torch.float32)
    else:
        model = new_model(tokenizer.get_vocab_size(), tokenizer.token_to_id)
        start_near_recall(model, tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {tokenizer.get_vocab_size()}", flush=True)
    optimizers = new_optimizers(model)

    def passed() -> bool:
        return stage + 1 < len(STAGES) and recall_score(model, checks, STAGES[stage]) >= STAGE_PASSED

    began, stage, best = time.monotonic(), 0, -1.0
    while args.resume and passed():
        stage += 1
    for step in range(args.steps):
        # With --minutes the schedule follows the clock where that is further on: a slow machine ends in time,
        # with a low learning rate, at the price of a run that can't be repeated exactly.
        minutes = (time.monotonic() - began) / 60
        done = min(1.0, max(step / args.steps, minutes / args.minutes if args.minutes else 0.0))
        if done >= 1.0:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        share = min(1, (step + 1) / WARMUP_STEPS) * (LR_FLOOR + (1 - LR_FLOOR) * cosine)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = share * group["initial_lr"]

        # Late in the run every other step sees the weights as int4 would store them.
        int4 = done >= args.int4_from and step % 2 == 1
        parts = [batches.recall(STAGES[stage]), batches.chats()]
        losses = []
        with fake_int4(model, on=int4):
            for (ids, labels), weight in zip(parts, LOSS_WEIGHTS):
                logits, targets = answer_logits(model, ids, labels)
                loss = F.cross_entropy(logits, targets)
                (loss * weight).backward()
                losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

        if (step + 1) % CHECK_EVERY == 0:
            scores = check(model, checks, STAGES[stage])
            print(
                f"step {step + 1}, {minutes:.1f} min, lists to {STAGES[stage]}, lr {share:.2f},",
                "loss " + " ".join(f"{loss:.3f}" for loss in losses) + ",",
                " ".join(f"{name} {score:.2f}" for name, score in scores.items()),
                flush=True,
            )
            score = scores["@10"] + scores["@20"] + scores["@40"] + scores["sums"]
            # So that a usable checkpoint exists at any moment. Later is better where there's a tie, or
            # near the end, where the learning rate is lowest and a point on 64 lists is noise.
            if score >= best - (0.1 if done > 0.9 else 0):
                best = max(best, score)
                save(model, tokenizer, args.out)
            while passed():
                stage += 1
    print(f"{(time.monotonic() - began) / 60:.1f} min")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the checkpoint goes")
    parser.add_argument("--resume", type=Path, help="a checkpoint to go on from, with a new schedule")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--minutes", type=float, help="end by this time even if the steps aren't done")
    parser.add_argument("--int4-from", type=float, default=0.7, help="share of the run after which int4 is simulated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args)
    evaluate(args.out)


if __name__ == "__main__":
    main()

"""Small random Qwen3 checkpoints, and what transformers computes with them in fp32.

    python make_references.py            # every case, into folders beside this file
    python make_references.py gqa4-tied-fp16

Each case is one way in which real checkpoints differ: heads per KV head, tied or untied embeddings, weight
type, shards, style of config. The numbers are computed from the files as written, not from the model in memory.
"""

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

PROMPT_LENGTHS = [1, 7, 33, 90]
ALL_POSITIONS_LENGTH = 7
GREEDY_TOKENS = 64

# Another order of additions moves a logit by about 1e-5. Greedy tokens can only be compared if no step of the
# path is near a tie, and comparing them says little if they are all the same.
MARGIN_MIN = 0.02
DISTINCT_MIN = 24

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
POSITIONS_MAX = 512

# Only the tokenizer is trained on this; the models are random.
TEXT = """
A forebay is the basin above a hydro plant, where water waits until a turbine can take it. Requests wait in a durable
queue, and prefill and decode workers take what they can. Prefill runs the whole prompt at once and fills the cache;
decode reads the cache and makes one token per step. What waits in the queue is not lost when a worker is.
"""

# As Qwen splits: words with the character before them, digits one by one.
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@dataclass
class Case:
    name: str
    seed: int
    dtype: torch.dtype
    tied: bool
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    hidden: int = 64
    intermediate: int = 128
    layers: int = 2
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    shard_size: str = "1GB"
    # Before transformers 5: `rope_theta` and `torch_dtype` at the top level, no `rope_parameters`.
    old_config: bool = False


CASES = [
    Case("gqa1-tied-bf16", 1, torch.bfloat16, tied=True, heads=4, kv_heads=4, head_dim=16, vocab=288),
    Case(
        "gqa2-untied-fp32-sharded",
        2,
        torch.float32,
        tied=False,
        heads=4,
        kv_heads=2,
        head_dim=16,
        vocab=320,
        shard_size="150KB",
        old_config=True,
    ),
    # Heads together are twice as wide as the hidden state.
    Case(
        "gqa4-tied-fp16",
        3,
        torch.float16,
        tied=True,
        heads=8,
        kv_heads=2,
        head_dim=16,
        vocab=384,
        layers=3,
        rope_theta=1_000_000.0,
        norm_eps=1e-5,
    ),
    # Neither 80 nor 144 is a multiple of 32: the last int4 block of a row is padded.
    Case(
        "gqa2-untied-bf16-ragged",
        4,
        torch.bfloat16,
        tied=False,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=320,
        hidden=80,
        intermediate=144,
    ),
]


def train_tokenizer(vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    assert tokenizer.get_vocab_size() == vocab
    return tokenizer


def random_model(case: Case, eos: int, pad: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=case.vocab,
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        head_dim=case.head_dim,
        max_position_embeddings=POSITIONS_MAX,
        rms_norm_eps=case.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": case.rope_theta},
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = Qwen3ForCausalLM(config)
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                # A norm left at 1 would hide that it was forgotten, or taken from another layer.
                weight.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                # Small beside what the layers add. Otherwise, with tied embeddings, every token predicts itself.
                weight.copy_(0.4 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    return model.to(case.dtype)


def write_checkpoint(case: Case, folder: Path) -> Tokenizer:
    tokenizer = train_tokenizer(case.vocab)
    pad, _, eos = (tokenizer.token_to_id(token) for token in SPECIAL)
    model = random_model(case, eos, pad)
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(folder, max_shard_size=case.shard_size)
    if case.old_config:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
        config["torch_dtype"] = config.pop("dtype")
        del config["layer_types"]
        config["transformers_version"] = "4.51.0"
        path.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")

    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": POSITIONS_MAX,
        "pad_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    return tokenizer


@torch.no_grad()
def greedy(model: Qwen3ForCausalLM, prompt: list[int]) -> tuple[list[int], float]:
    """The greedy tokens, none of which ends the text, and the smallest lead of a token over the runner-up."""
    tokens, cache, ids = [], None, prompt
    for _ in range(GREEDY_TOKENS):
        out = model(torch.tensor([ids]), past_key_values=cache, use_cache=True)
        ids, cache = [out.logits[0, -1].argmax().item()], out.past_key_values
        tokens += ids
    # Once more without the KV cache: the two must agree, and this gives the margins.
    logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    top = logits.topk(2, dim=-1)
    margin = (top.values[:, 0] - top.values[:, 1]).min().item()
    assert margin < MARGIN_MIN or top.indices[:, 0].tolist() == tokens
    return tokens, margin


def find_prompt(model: Qwen3ForCausalLM, length: int, generator: torch.Generator) -> dict:
    """Draws prompts until one has a clear and varied greedy path, free of special tokens."""
    for _ in range(1000):
        ids = torch.randint(len(SPECIAL), model.config.vocab_size, (length,), generator=generator).tolist()
        tokens, margin = greedy(model, ids)
        if margin >= MARGIN_MIN and len(set(tokens)) >= DISTINCT_MIN and min(tokens) >= len(SPECIAL):
            return {"ids": ids, "greedy": tokens, "margin_min": round(margin, 4)}
    raise RuntimeError(f"no clear greedy path from {length} tokens")


@torch.no_grad()
def write_reference(case: Case, folder: Path) -> None:
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    assert model.config.rope_parameters["rope_theta"] == case.rope_theta
    generator = torch.Generator().manual_seed(case.seed)
    prompts, tensors = [], {}
    for length in PROMPT_LENGTHS:
        prompt = find_prompt(model, length, generator)
        logits = model(torch.tensor([prompt["ids"]])).logits[0]
        tensors[f"last_logits.{len(prompts)}"] = logits[-1].clone()
        if length == ALL_POSITIONS_LENGTH:
            tensors[f"all_logits.{len(prompts)}"] = logits.clone()
        prompts.append(prompt)

    # The other attention kernel of torch shows how far apart two right answers lie.
    other = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    apart = max(
        (other(torch.tensor([prompt["ids"]])).logits[0, -1] - tensors[f"last_logits.{i}"]).abs().max().item()
        for i, prompt in enumerate(prompts)
    )
    save_file(tensors, folder / "reference.safetensors")
    reference = {"name": case.name, "prompts": prompts, "eager_sdpa_apart_max": float(f"{apart:.1e}")}
    (folder / "reference.json").write_text(json.dumps(reference) + "\n")
    print(
        f"{case.name}: logit std {tensors['all_logits.1'].std():.2f}, apart {apart:.1e},",
        "margins " + " ".join(str(prompt["margin_min"]) for prompt in prompts) + ",",
        "distinct " + " ".join(str(len(set(prompt["greedy"]))) for prompt in prompts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="the cases to write (default: all)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for case in CASES:
        if args.names and case.name not in args.names:
            continue
        folder = args.out / case.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_checkpoint(case, folder)
        write_reference(case, folder)


if __name__ == "__main__":
    main()

"""The demo's tokenizer: byte-level BPE over its own text, in the ChatML format."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import skills
from skills import Turn

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PAD, _, EOS = SPECIAL

# Qwen's splitting rule with one change: a digit takes the space before it, so that a pair such as
# " stone is 17." is five tokens rather than six. Digits stay one token each, which sums need.
SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(SPLIT, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Ten times the list words, so that each becomes one token, with a space before it (in the list and
    # the question) and without (where an answer begins with it).
    text = [form for word in skills.WORDS for form in (word, f" {word}")] * 10
    text += [f"{digit} {digit}" for digit in range(10)] * 10
    # Questions also follow a list, after a space.
    text += [form for questions, _ in skills.FAQ for line in questions for form in (line, f" {line}")]
    text += [answer for _, answer in skills.FAQ] * 2
    text += [*skills.SUM_PHRASINGS, *skills.SYSTEMS, "system\nuser\nassistant\n"] * 10
    # All 256 bytes are in the alphabet: any UTF-8 can be encoded, if not cheaply.
    trainer = trainers.BpeTrainer(
        vocab_size=2560,
        min_frequency=2,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    check(tokenizer)
    return tokenizer


def check(tokenizer: Tokenizer) -> None:
    for word in skills.WORDS:
        for form in (word, f" {word}"):
            assert len(tokenizer.encode(form).ids) == 1, f"{form!r} is not one token"
    for _, answer in skills.FAQ:
        tokens_n = len(tokenizer.encode(answer + EOS).ids)
        assert tokens_n <= 28, f"{tokens_n} tokens: {answer}"
    for text in ["stone is 17.", "naïve 日本語 🙂\r\n\t  x", "12 plus 30"]:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def render(turns: list[Turn]) -> list[tuple[str, bool]]:
    """The chat template, cut into pieces: (text, whether the model is to write it).

    The end-of-turn token belongs to the answer, the newline after it does not: generation stops before it."""
    pieces = []
    for role, content in turns:
        if role == "assistant":
            pieces += [("<|im_start|>assistant\n", False), (content + EOS, True), ("\n", False)]
        else:
            pieces.append((f"<|im_start|>{role}\n{content}{EOS}\n", False))
    return pieces


def save(tokenizer: Tokenizer, folder: Path, positions_max: int) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": positions_max,
        "pad_token": PAD,
        "eos_token": EOS,
        "bos_token": None,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

"""Where training starts: random weights, except for the two steps that recall is made of.

From random weights alone, recall forms late, after a long plateau: neither step helps before the other is there.
    1. In the first layer a token looks a fixed distance back, so that a value knows the key before it.
    2. In the second layer the place where an answer goes on looks for the token that knows the same key.
Both are written into a few heads here, roughly. Training is free to move them, and does the rest.
"""

import torch
from tokenizers import Tokenizer
from transformers import Qwen3ForCausalLM

import skills

# The hidden state at the start: a constant, the token itself, and what stood one, two and three tokens back.
CONSTANT = 0
TOKEN = slice(1, 96)
BACK = {1: slice(96, 128), 2: slice(128, 160), 3: slice(160, 192)}
# Weights of the query and key norms: with both, attention scores four times as far apart.
SHARPNESS = 2.0
# How loud beside the embedding, whose elements are 0.02 at the start: keys carried forward, values copied.
CODE = 0.01
COPY = 0.6


@torch.no_grad()
def start_near_recall(model: Qwen3ForCausalLM, tokenizer: Tokenizer) -> None:
    config = model.config
    head_dim, half = config.head_dim, config.head_dim // 2
    group = config.num_attention_heads // config.num_key_value_heads
    frequency = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)

    embedding = model.model.embed_tokens.weight
    embedding[:, CONSTANT] = 4 * embedding.std()
    for back in BACK.values():
        embedding[:, back] *= 0.2
    for word in skills.WORDS:
        bare, spaced = (tokenizer.token_to_id(form) for form in (word, f"Ġ{word}"))
        embedding[spaced, TOKEN] = embedding[bare, TOKEN] + 0.2 * embedding[spaced, TOKEN]

    looking, matching = (layer.self_attn for layer in model.model.layers[:2])
    for attention in (looking, matching):
        attention.q_norm.weight.fill_(SHARPNESS)
        attention.k_norm.weight.fill_(SHARPNESS)

    def rows(head: int) -> slice:
        return slice(head * head_dim, (head + 1) * head_dim)

    # Step 1. Query and key depend on the constant alone. RoPE turns each pair of dimensions (i, i + half) by
    # position times frequency; a query turned back by `distance` fits the key just there. High frequencies
    # tell neighbours apart.
    fast = range(4)
    code = torch.zeros(head_dim, config.hidden_size)
    code[:, TOKEN] = torch.randn(head_dim, TOKEN.stop - TOKEN.start) * CODE
    for head, distance in [(0, 1), (1, 2), (2, 3)]:
        query = looking.q_proj.weight[rows(head)].zero_()
        key = looking.k_proj.weight[rows(head // group)].zero_()
        for i in fast:
            angle = -distance * frequency[i]
            query[i, CONSTANT], query[i + half, CONSTANT] = torch.cos(angle), torch.sin(angle)
            key[i, CONSTANT] = 1.0
        looking.v_proj.weight[rows(head // group)] = code
        looking.o_proj.weight[:, rows(head)] = 0.0
        looking.o_proj.weight[BACK[distance], rows(head)] = torch.eye(head_dim)

    # Step 2. The first digit follows "is", one after the key; in the list it is two after its key. The second
    # digit comes one later in both. Low frequencies make the match depend on the key and not on how far it is.
    slow = [*range(half // 2, half), *range(half + half // 2, head_dim)]
    projection = torch.linalg.qr(torch.randn(head_dim, len(slow))).Q.T
    for head, asks, knows in [(0, 1, 2), (2, 2, 3)]:
        for weight, back in [
            (matching.q_proj.weight[rows(head)], BACK[asks]),
            (matching.k_proj.weight[rows(head // group)], BACK[knows]),
        ]:
            weight.zero_()
            weight[slow, back] = projection
        # What it finds there it adds to its own state, as a rough copy that the head can read at once.
        copied = torch.linalg.qr(torch.randn(TOKEN.stop - TOKEN.start, head_dim)).Q.T
        matching.v_proj.weight[rows(head // group)] = 0.0
        matching.v_proj.weight[rows(head // group), TOKEN] = copied
        matching.o_proj.weight[:, rows(head)] = 0.0
        matching.o_proj.weight[TOKEN, rows(head)] = COPY * copied.T

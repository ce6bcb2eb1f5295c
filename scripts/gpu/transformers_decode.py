#!/usr/bin/env python3
"""Decode one row with transformers: bf16, a static cache, torch.compile with CUDA graphs.

    transformers_decode.py CHECKPOINT…

Prints the median step over the same checkpoints, context and number of steps as `forebay gpu-check`.
"""
import statistics
import sys
import time

import torch
from transformers import AutoModelForCausalLM, StaticCache

CONTEXT, STEPS = 512, 100


@torch.inference_mode()
def measure(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS + 32)
    ids = torch.arange(CONTEXT, device="cuda")[None] * 2654435761 % model.config.vocab_size
    token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    times = []
    for number in range(STEPS + 20):
        position = torch.tensor([CONTEXT + number], device="cuda")
        torch.cuda.synchronize()
        begun = time.perf_counter()
        logits = step(token, past_key_values=cache, cache_position=position, use_cache=True).logits
        token = logits[:, -1:].argmax(-1).clone()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    median = statistics.median(times[20:])
    print(f"        {folder}: transformers, 1 at once: {1 / median:.0f} tok/s, {median * 1e3:.2f} ms a step", flush=True)


for folder in sys.argv[1:]:
    measure(folder)

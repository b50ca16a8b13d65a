"""What compare_memory.py compares es_lite with: a Hugging Face model trained by torch.optim.AdamW in fp32, in its own process.

    python tools/_adamw.py CONFIG_FOLDER TOKENS.npy MICRO_BATCH [--checkpointing]

TOKENS: int64 [steps, samples, length]. Random weights, the default attention, a gradient summed over the micro-batches of a
step, gradients freed between steps (torch's default): what a user would write first. Nothing of es_lite is imported.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM


def train(config: Path, tokens: np.ndarray, micro_batch: int, checkpointing: bool) -> None:
    """Takes an optimiser step for each of `tokens`, int64 [steps, samples, length], and prints its loss."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config), dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for step in tokens:
        total = 0.0
        for start in range(0, len(step), micro_batch):
            batch = torch.from_numpy(step[start : start + micro_batch])
            loss = model(input_ids=batch, labels=batch).loss * len(batch) / len(step)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {total:.4f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("micro_batch", type=int)
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    train(given.config, np.load(given.tokens), given.micro_batch, given.checkpointing)

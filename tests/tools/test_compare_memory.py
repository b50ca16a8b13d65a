"""tools/compare_memory.py: the command, and its formula against what autograd keeps."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import compare_memory
import psutil
import pytest
import torch
from _memory_formula import Load, adamw_parts, block_bytes, load_model
from support import ROOT, TEXT, TINY
from transformers import AutoConfig, AutoModelForCausalLM

TOOL = ROOT / "tools/compare_memory.py"
MODES = ["adamw", "adamw-checkpointing", "bf16", "lowrank", "int8", "streamed"]
SMALL = TINY | {"hidden_size": 96, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 2}


def compare(*arguments: object, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command, with the modules in `path` before all others."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def kept_bytes(layers: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps of a forward over 4 x 64 tokens, without the parameters."""
    config = AutoConfig.for_model(**(SMALL | {"num_hidden_layers": layers}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    tokens = torch.randint(0, config.vocab_size, (4, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=tokens, labels=tokens).loss
    assert loss.isfinite()
    return sum(size for size, _ in kept.values())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_block_keeps_what_the_formula_says(checkpointing):
    config = AutoConfig.for_model(**SMALL)
    block = 4 * config.hidden_size if checkpointing else block_bytes(config)
    assert kept_bytes(3, checkpointing) - kept_bytes(2, checkpointing) == 4 * 64 * block


def test_all_sizes_by_formula(tmp_path):
    done = compare("--out", tmp_path / "memory")
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads((tmp_path / "memory.json").read_text())
    figures = {(figure["size"], figure["mode"]): figure for figure in document["figures"]}
    assert [mode for size, mode in figures if size == "qwen3-32b"] == MODES
    for (size, mode), figure in figures.items():
        assert figure["measured"] is None and figure["computed"] == sum(figure["parts"].values())
        if mode == "adamw":
            assert 16 * figure["parameters"] < figure["computed"] < 24 * figure["parameters"]
            ratio = figure["computed"] / figures[size, "int8"]["computed"]
            assert document["adamw_over"][size]["int8"] == pytest.approx(ratio, abs=1e-3) and ratio > 4
            assert f"{ratio:.1f} times" in done.stdout
    assert figures["qwen3-0.5b", "adamw"]["parts"]["activations"] > figures["qwen3-0.5b", "adamw"]["parts"]["logits"] > 0
    assert struct.unpack(">II", (tmp_path / "memory.png").read_bytes()[16:24]) == (1560, 800)


def test_gradients_of_several_micro_batches_are_summed():
    model = load_model("qwen3-0.5b")
    one, two = (adamw_parts(model, Load(samples, 256, 4, 4, 2, 2, ""), False) for samples in (4, 8))
    assert (one["gradients"], two["gradients"]) == (0, 4 * model.layout.size)
    assert {**one, "gradients": 0} == {**two, "gradients": 0}


@pytest.mark.long
@pytest.mark.slow
def test_measured_through_the_real_runs(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["--samples", "3", "--length", "32", "--micro-batch", "2", "--steps", "1", "--streamed"]
    place = ["--text", tmp_path / "text.txt", "--directory", tmp_path, "--out", tmp_path / "memory"]
    done = compare("--config", tmp_path / "tiny.json", *words, *place)
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "memory.json").read_text())["figures"]
    assert [figure["mode"] for figure in figures] == MODES
    for figure in figures:
        assert 100 * 2**20 < figure["measured"] < 2**31
        assert figure["formula_over_measured"] == pytest.approx(figure["computed"] / figure["measured"], abs=1e-3)
        assert f"{figure['computed'] / figure['measured']:.3f}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory.json", "memory.png", "text.txt", "tiny.json"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sizes qwen3-9b", "qwen3-9b: expected qwen3-0.5b, "),
        ("--sizes {tmp}/none.json", "none.json: missing"),
        ("--sizes {tmp}/llama.json", "is a llama; the formula for what a block keeps is that of qwen3 alone"),
        ("--sizes {tmp}/tiny.json", "fitness.max_length = 256: the model's max_position_embeddings is 64"),
        ("--sizes {tmp}/tiny.json --length 32 --population 3", "es.population = 3: must be even"),
        (
            "--config {tmp}/tiny.json --length 32 --samples 999 --text {tmp}/text.txt",
            "fitness.samples = 999: the corpus has only",
        ),
        ("--measure qwen3-32b", "AdamW, fp32: does not fit: needs 790."),
        ("--out {tmp}/nowhere/memory", "nowhere is not a folder that can be written to"),
        ("--directory {tmp}/nowhere", "cannot be written to (No such file or directory)"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    if "qwen3-32b" in words and psutil.virtual_memory().total > 700 * 2**30:
        pytest.skip("this machine could hold it")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "llama.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    (tmp_path / "text.txt").write_text(TEXT)
    out = [] if "--out" in words else ["--out", str(tmp_path / "memory")]
    assert compare_memory.main([*words.format(tmp=tmp_path).split(), *out]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compare_memory: ") and message in error
    assert not list(tmp_path.glob("memory.*"))


def test_without_matplotlib(tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise ImportError")
    done = compare("--out", tmp_path / "memory", path=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "compare_memory: the plot needs matplotlib, which is not installed: pip install 'es_lite[plot]'\n"


def test_a_number_below_one_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        compare_memory.main(["--steps", "0"])
    assert ended.value.code == 2 and "0: expected a whole number of at least 1" in capsys.readouterr().err

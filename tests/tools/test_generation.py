"""tools/benchmark.py generation: what it prints on a tiny model, the plain loop, and the matrices of the GEMM."""

import contextlib
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import _generation
import _llama
import benchmark
import numpy as np
import pytest
import torch
from _plain_loop import PlainLoop
from support import TINY

from es_lite.model.origin import Origin
from es_lite.tables import ModelTable

COMPARED = [
    "plain loop, fp32, 2 threads",
    "plain loop, bf16, 2 threads",
    "es_lite, lowrank, C, 2 workers",
    "es_lite, gaussian, C, 2 workers",
    "es_lite, lowrank, C, 2 workers, over plain loop, T, 2 threads",
    "es_lite, gaussian, C, 2 workers, over plain loop, T, 2 threads",
]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the sub-command on a tiny model with random weights, and returns what it prints."""
    monkeypatch.setattr(_generation, "SMOLLM2", TINY)
    monkeypatch.setattr(_generation, "DECODED", 3)
    threads = torch.get_num_threads()

    def printed(*words: str) -> str:
        sizes = ["--prompts", "2", "--prompt-tokens", "6", "--new-tokens", "5", "--turns", "1"]
        assert benchmark.main(["generation", "--model", "no/such/folder", *sizes, *words]) == 0
        return capsys.readouterr().out

    yield printed
    torch.set_num_threads(threads)


def cells(out: str) -> list[list[str]]:
    """The lines of the table, without its head."""
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|")]
    return lines[2:]


@pytest.mark.slow
def test_es_lite_is_compared_with_the_plain_loop_in_both_types(printed):
    out = printed("--population", "4", "--plain-members", "1")
    assert out.startswith("`python tools/benchmark.py generation ") and "cpu_features " in out
    assert "random weights of SmolLM2-135M's shape: N = 4, 2 prompts of 6 tokens, 5 new tokens" in out
    rows = {re.sub(r"over plain loop, (fp32|bf16)", "over plain loop, T", line[0]): float(line[1]) for line in cells(out)}
    rows = {re.sub(r"(lowrank|gaussian), (fp32|bf16)", r"\1, C", name): value for name, value in rows.items()}
    assert list(rows) == COMPARED and all(value > 0 for value in rows.values())
    better = max(rows[name] for name in COMPARED[:2])
    assert rows[COMPARED[4]] == pytest.approx(rows[COMPARED[2]] / better, rel=0.02)


@pytest.mark.slow
def test_low_rank_decoding_is_compared_with_a_gemm_of_a_tiles_rows(printed):
    out = printed("--rate")
    # Half of the population of 32 shares a tile: 16 members with 2 prompts each.
    gemm, decoding, share = cells(out)
    assert gemm[0].startswith("GEMM, 32 rows, ") and decoding[0].startswith("low-rank decoding, tiles of 32 sequences, ")
    assert "4 new tokens" in out and share[0] == "share of the GEMM rate"
    assert float(gemm[1]) > 0 and float(share[1]) == pytest.approx(float(decoding[1]) / float(gemm[1]), rel=0.02)


@pytest.mark.slow
def test_the_parts_of_a_step_are_shares_of_it(printed):
    rows = cells(printed("--shares", "--population", "4"))
    assert [line[0] for line in rows] == ["prefill", "decoding", "grading", "update", "step"]
    *parts, step = [float(line[3].rstrip("%")) for line in rows]
    assert step == 100 and sum(parts) == pytest.approx(100, abs=0.3)
    assert all(0 < part < 100 for part in parts)


def test_every_member_of_the_plain_loop_generates_under_its_own_noise():
    sigma = 0.5
    loop = PlainLoop(ModelTable(config=TINY), torch.float32, np.ones((2, 4), np.int32), 3, sigma)
    weights = next(loop._model.parameters())
    before, seen, generate = weights.detach().clone(), [], loop._model.generate

    def spy(*arguments, **options):
        seen.append((weights - before) / sigma)
        return generate(*arguments, **options)

    loop._model.generate = spy
    loop.run(2)
    assert [float(noise.std()) for noise in seen] == pytest.approx([1, 1], abs=0.05)
    assert abs(float(torch.corrcoef(torch.stack([noise.flatten() for noise in seen]))[0, 1])) < 0.1
    assert torch.allclose(weights, before, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gemm_has_the_matrices_that_a_token_passes(tied):
    layout = Origin("", TINY | {"tie_word_embeddings": tied}, 0, (), False, False).skeleton()[1]
    matrices = _generation.matrices_of(layout, torch.float32)
    assert matrices[-1].shape == (257, 32) and len(matrices) == 2 * 7 + 1
    multiplied = sum(matrix.numel() for matrix in matrices)
    vectors = sum(tensor.size for tensor in layout.tensors if len(tensor.shape) == 1)
    assert multiplied == layout.size - vectors - (0 if tied else 257 * 32)  # the embedding is read, not multiplied


class FakeServer:
    """llama.cpp, whose CPU time is 1 s for a prompt and 0.5 s for each further token of all sequences."""

    clock = 0.0

    def __init__(self, parameters: SimpleNamespace) -> None:
        assert parameters.cpuparams.n_threads == parameters.cpuparams_batch.n_threads == 1
        self.batch = parameters.n_parallel

    def handle_completions(self, asked: dict) -> dict:
        assert asked["ignore_eos"] and len(asked["prompt"]) == 6
        FakeServer.clock += (1 + 0.5 * (asked["n_predict"] - 1)) / self.batch
        return {"usage": {"completion_tokens": asked["n_predict"]}}


def test_llama_cpps_decoding_is_measured_in_cpu_time(monkeypatch, printed):
    def parameters() -> SimpleNamespace:
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=SimpleNamespace(), cpuparams_batch=SimpleNamespace())

    monkeypatch.setitem(sys.modules, "xllamacpp", SimpleNamespace(CommonParams=parameters, Server=FakeServer))
    monkeypatch.setattr(_llama._packages, "wheel", lambda *_: contextlib.nullcontext(SimpleNamespace(extract=lambda *_: "gguf")))
    monkeypatch.setattr(_llama, "ThreadPoolExecutor", lambda batch: ThreadPoolExecutor(1))
    monkeypatch.setattr(_llama, "time", SimpleNamespace(process_time=lambda: FakeServer.clock))
    rates = {line[0]: line[1] for line in cells(printed("--llama"))}
    assert rates == {f"llama.cpp, Q4_1, batch {batch}, one thread": f"{2 * batch}" for batch in (1, 8, 32)}


def test_llama_cpp_is_not_required(monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit, match="pip install xllamacpp=="):
        benchmark.main(["generation", "--llama"])


@pytest.mark.parametrize("words", [["--population", "3"], ["--turns", "0"], ["--plain-members", "0"], ["--rate", "--shares"]])
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        benchmark.main(["generation", *words])
    assert ended.value.code == 2 and "usage: benchmark.py generation" in capsys.readouterr().err

"""The design's invariants through the real command, and what else a run promises: signals, resumption, what it leaves.

One undisturbed run of two workers is the reference; every other way to the same step must give its bits.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support import (
    ROOT,
    TINY,
    Live,
    digest,
    export_digest,
    finished_run,
    left,
    leftovers,
    records,
    start,
    train,
    write_recipe,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es_lite import recipe as recipes
from es_lite import replay
from es_lite import train as training
from es_lite.algorithm import noise
from es_lite.weights.layout import layout, skeleton
from es_lite.weights.source import configuration
from es_lite.weights.working import WorkingCopy, allocate

STOPPING = "\nstopping at the end of this step; once more stops at once (nothing is lost)\n"

STEPS = 100
KILLS = 20

METRICS = (
    "step score_mean score_std score_best eval_score sigma alpha tokens tokens_per_second step_seconds score_seconds "
    "update_seconds pss_gib peak_pss_gib read_gib written_gib workers"
)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = {"iterations": STEPS, "checkpoint_every": 3, "checkpoint_dtype": "fp32"}
    return write_recipe(tmp_path_factory.mktemp("recipe"), run=run, eval={"every": 10, "samples": 4})


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that nothing disturbed."""
    return finished_run(recipe, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture(scope="module")
def three_steps(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, evaluated and kept at the second and at the end."""
    overrides = ("run.iterations=3", "eval.every=2", "run.checkpoint_every=2")
    return finished_run(recipe, tmp_path_factory.mktemp("three-steps") / "run", *overrides)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder, as transformers saves it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(folder)
    return folder


def assert_same_run(run: Path, reference: Path) -> None:
    assert digest(run) == digest(reference)
    assert export_digest(run) == export_digest(reference)
    assert leftovers(run) == []


def master_tensors(run: Path) -> dict[str, np.ndarray]:
    return {name: values for path in (run / "master").glob("*.safetensors") for name, values in load_file(path).items()}


def replayed(run: Path, out: Path, *options: str) -> dict[str, np.ndarray]:
    """The tensors that `python -m es_lite.replay` writes."""
    assert replay.main([str(run), "--out", str(out), "--dtype", "fp32", *options]) == 0
    return load_file(out / "model.safetensors")


def assert_same_bits(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    for name, values in left.items():
        assert values.dtype == right[name].dtype == np.float32
        assert values.tobytes() == right[name].tobytes(), name


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# 1: any number of workers, killed or not


@pytest.mark.slow
def test_one_worker_or_two_give_the_same_bits(recipe: Path, reference: Path, tmp_path: Path) -> None:
    assert train(recipe, tmp_path / "run", "workers.count=1").code == 0
    assert digest(tmp_path / "run") == digest(reference)


@pytest.mark.slow
def test_workers_killed_at_random_moments_change_no_bit(recipe: Path, reference: Path, tmp_path: Path) -> None:
    moments = random.Random(1)
    kills = 0
    with start(recipe, tmp_path / "run") as live:
        while kills < KILLS:
            live.wait_for_records(live.records() + 1)  # so that no task loses three workers in turn
            for worker in live.workers():
                time.sleep(moments.uniform(0, 0.05))
                worker.kill()
                kills += 1
        finished = live.finish()
    assert finished.code == 0, finished.err
    assert finished.err.count("died (exit code -9); a new one repeats its") == kills
    assert_same_run(tmp_path / "run", reference)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced_and_changes_no_bit(recipe: Path, reference: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "workers.deadline=8") as live:
        live.wait_for_records(3)
        worker = live.workers()[0]
        worker.suspend()
        finished = live.finish()
        assert left(live.process.pid) == []
    assert finished.code == 0, finished.err
    assert f"worker {worker.pid} did not answer within its deadline; it is replaced" in finished.err
    assert_same_run(tmp_path / "run", reference)


# 2: killed at any moment and resumed


@pytest.mark.slow
def test_a_run_killed_at_random_moments_and_resumed_ends_with_the_same_bits(
    recipe: Path, reference: Path, tmp_path: Path
) -> None:
    moments = random.Random(2)
    run = tmp_path / "run"
    start_up = 0.0
    for kill in range(KILLS):
        workers = moments.choice((1, 2))  # may differ between resumptions
        with start(recipe, run, f"workers.count={workers}", resume=True) as live:
            if kill % 2:
                end, enough = time.monotonic() + moments.uniform(0, start_up), records(run) + 3  # the last step is not for here
                while time.monotonic() < end and live.records() < enough:
                    time.sleep(0.002)
            else:
                start_up = time_to_records(live, records(run) + moments.randint(1, 3))
                time.sleep(moments.uniform(0, 0.1))
            assert live.process.poll() is None, live.err
            live.process.kill()
            live.process.wait()
            assert left(live.process.pid) == []
    assert records(run) < STEPS
    finished = train(recipe, run, resume=True)
    assert finished.code == 0, finished.err
    assert_same_run(run, reference)


def time_to_records(live: Live, count: int) -> float:
    began = time.monotonic()
    live.wait_for_records(count)
    return time.monotonic() - began


@pytest.mark.parametrize("there", [["master"], ["master", "lock"], ["master", "lock", "recipe.toml.next"]])
def test_a_run_killed_before_its_recipe_was_written_is_still_a_run_directory(
    recipe: Path, tmp_path: Path, there: list[str]
) -> None:
    """What a kill at the very start leaves."""
    run = tmp_path / "run"
    (run / "master").mkdir(parents=True)
    for name in there[1:]:
        (run / name).write_text("")
    assert get_past_the_run_directory(recipe, run)


def get_past_the_run_directory(recipe: Path, run: Path) -> bool:
    """Whether the command takes the directory: it stops at the draw of samples, which comes after."""
    options = ["--set", f"run.dir={run}", "--set", "fitness.samples=1000000", "--resume"]
    return training.main([str(recipe), *options]) == 2 and (run / "recipe.toml").exists()


@pytest.mark.slow
def test_a_lost_master_and_a_torn_record_are_made_again(recipe: Path, reference: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(reference, run, ignore=shutil.ignore_patterns("checkpoint", "best"))
    shutil.rmtree(run / "master")
    os.truncate(run / "journal.jsonl", (run / "journal.jsonl").stat().st_size - 20)
    finished = train(recipe, run, resume=True)
    assert finished.code == 0, finished.err
    assert digest(run) == digest(reference)


# 3: θ₀ and the journal alone


def test_the_journal_alone_gives_the_weights_back(reference: Path, tmp_path: Path) -> None:
    shutil.copy(reference / "journal.jsonl", tmp_path)
    command = [
        sys.executable,
        "-m",
        "es_lite.replay",
        str(tmp_path / "journal.jsonl"),
        "--out",
        str(tmp_path / "out"),
        "--dtype",
        "fp32",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    assert_same_bits(load_file(tmp_path / "out/model.safetensors"), master_tensors(reference))


@pytest.mark.slow
def test_replay_to_a_step_gives_the_weights_of_a_run_of_so_many_steps(reference: Path, three_steps: Path, tmp_path: Path) -> None:
    assert_same_bits(replayed(reference, tmp_path / "out", "--step", "3"), master_tensors(three_steps))


@pytest.mark.slow
def test_a_pretrained_model_that_has_moved_is_replayed_and_another_is_refused(
    pretrained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pretrained, model)
    recipe = write_recipe(tmp_path, run={"iterations": 4}, model={"config": "", "path": str(model)})
    assert train(recipe, tmp_path / "run").code == 0
    moved = model.rename(tmp_path / "moved")
    journal = tmp_path / "run/journal.jsonl"
    assert_same_bits(replayed(journal, tmp_path / "out", "--model", str(moved)), master_tensors(tmp_path / "run"))

    assert replay.main([str(journal), "--out", str(tmp_path / "gone")]) == 2
    assert str(model) in capsys.readouterr().err
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x3c")
    assert replay.main([str(journal), "--out", str(tmp_path / "other"), "--model", str(moved)]) == 2
    assert f"{journal}: is the journal of another model" in capsys.readouterr().err
    assert not (tmp_path / "gone").exists() and not (tmp_path / "other").exists()


# 5: workers cannot write what they score from


@linux
@pytest.mark.slow
def test_no_process_maps_the_working_copy_writable(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "run.iterations=10000") as live:
        live.wait_for_records(2)
        workers = live.workers()
        mappings = {process.pid: working_copy_permissions(process.pid) for process in workers}
        coordinators = working_copy_permissions(live.process.pid)
    assert len(workers) == 2
    assert all(mappings.values())
    for permissions in (*mappings.values(), coordinators):
        assert set(permissions) <= {"r--s"}


def working_copy_permissions(pid: int) -> list[str]:
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[1] for line in lines if "es_lite-working-copy" in line]


def test_the_working_copy_cannot_be_written_through_its_view() -> None:
    shape = layout(skeleton(configuration("", TINY)))
    descriptor = allocate(shape, "bf16")
    bits = WorkingCopy(shape, "bf16", descriptor).part(shape.tensors[0]).data
    os.close(descriptor)
    assert not bits.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        bits[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        bits.flags.writeable = True


# 6: a step is what the papers' formulas say


@pytest.mark.slow
@pytest.mark.parametrize(
    "es",
    [
        {},
        {
            "population": 5,
            "antithetic": False,
            "shaping": "rank",
            "scale": "nes",
            "alpha": 1e-3,
            "weight_decay": 0.5,
            "groups": [{"pattern": "mlp", "sigma": 2.0, "alpha": 0.5}],
        },
    ],
    ids=["zscore", "rank-nes-groups-decay"],
)
def test_a_step_of_known_scores_moves_the_model_as_the_formulas_say(tmp_path: Path, es: dict) -> None:
    recipe = write_recipe(tmp_path, run={"iterations": 1, "seed": 7}, es=es)
    assert train(recipe, tmp_path / "run").code == 0
    scores = np.array(json.loads((tmp_path / "run/journal.jsonl").read_text().splitlines()[1])["scores"])
    before = replayed(tmp_path / "run", tmp_path / "before", "--step", "0")
    after = master_tensors(tmp_path / "run")
    table = recipes.load(recipe).es
    numbers = {name: i for i, (name, _) in enumerate(skeleton(configuration("", TINY)).named_parameters())}
    errors = updates = 0.0
    for name, theta in before.items():
        expected = step_in_float64(theta.astype(np.float64).ravel(), name, numbers[name], table, scores)
        updates += float(np.sum(np.square(expected)))
        errors += float(np.sum(np.square(after[name].ravel() - (theta.ravel() + expected))))
    assert updates > 0
    assert np.sqrt(errors / updates) < 1e-6


def step_in_float64(theta: np.ndarray, name: str, number: int, es: recipes.ESTable, scores: np.ndarray) -> np.ndarray:
    """θ₁ − θ₀ of one tensor: α/N Σ w ε, divided by σ for NES, less α λ θ."""
    group = next((group for group in es.groups if group.pattern in name), recipes.Group())
    if es.shaping == "zscore":
        weights = (scores - scores.mean()) / (scores.std() + 1e-8)
    else:
        weights = 2 * np.argsort(np.argsort(scores)) / (len(scores) - 1) - 1
    alpha, sigma = es.alpha * group.alpha, es.sigma * group.sigma
    gradient = np.zeros_like(theta)
    for member, weight in enumerate(weights):
        pair, sign = (member // 2, (-1) ** member) if es.antithetic else (member, 1)
        gradient += weight * sign * noise.gaussian(7, 0, pair, number, 0, theta.size) / len(scores)
    return (alpha / sigma if es.scale == "nes" else alpha) * gradient - alpha * es.weight_decay * theta


# Signals


@pytest.mark.slow
def test_ctrl_c_or_sigterm_end_at_the_steps_end_and_resuming_changes_no_bit(
    recipe: Path, reference: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for number, more in ((signal.SIGINT, 4), (signal.SIGTERM, 3)):
        with start(recipe, run, resume=True) as live:
            live.wait_for_records(records(run) + more)
            os.killpg(live.process.pid, number)  # as a terminal, or a supervisor, does
            finished = live.finish()
            assert left(live.process.pid) == []
        assert (finished.code, finished.err) == (0, STOPPING)
        assert f"add --resume to go on from step {records(run)}" in finished.out
        assert json.loads((run / "checkpoint/es_lite.json").read_text())["step"] == records(run) < STEPS
        assert metrics(run)[-1]["step"] == records(run)
        (run / "master/block-001.safetensors").unlink()  # θ₀ and the journal make it again
    assert train(recipe, run, resume=True).code == 0
    assert_same_run(run, reference)


@pytest.mark.slow
def test_ctrl_c_while_the_workers_start_is_quiet(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run") as live:
        live.wait_until(lambda: len(live.workers()) == 2)
        time.sleep(0.5)
        os.killpg(live.process.pid, signal.SIGINT)
        finished = live.finish()
        assert left(live.process.pid) == []
    assert (finished.code, finished.err) == (0, STOPPING)
    assert (tmp_path / "run/checkpoint/model.safetensors").exists()


@pytest.mark.slow
def test_ctrl_c_twice_ends_at_once(recipe: Path, tmp_path: Path) -> None:
    with start(recipe, tmp_path / "run", "es.population=8192") as live:
        live.wait_until(lambda: "step 0/" in live.out)
        time.sleep(0.5)
        os.killpg(live.process.pid, signal.SIGINT)
        time.sleep(0.5)
        assert live.process.poll() is None
        os.killpg(live.process.pid, signal.SIGINT)
        finished = live.finish()
        assert left(live.process.pid) == []
    assert finished.code == 130
    assert finished.err == STOPPING + "es_lite: stopped at once; add --resume to go on\n"
    assert records(tmp_path / "run") == 0


# What a run leaves


def test_metrics_have_the_documented_names_and_a_line_a_step(reference: Path) -> None:
    first, *steps = metrics(reference)
    assert (first["step"], first["eval_score"] is not None) == (0, True)
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert " ".join(line) == METRICS


def test_evaluation_is_done_before_the_first_step_and_after_the_last(reference: Path) -> None:
    assert [line["step"] for line in metrics(reference) if line["eval_score"] is not None] == list(range(0, STEPS + 1, 10))


@pytest.mark.slow
def test_a_last_step_that_is_no_multiple_is_evaluated_and_kept(three_steps: Path) -> None:
    assert [line["step"] for line in metrics(three_steps) if line["eval_score"] is not None] == [0, 2, 3]
    assert json.loads((three_steps / "checkpoint/es_lite.json").read_text())["step"] == 3


def test_checkpoints_load_with_transformers(reference: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(reference / "checkpoint")
    assert_same_bits({name: p.detach().numpy() for name, p in model.named_parameters()}, master_tensors(reference))
    tokenizer = AutoTokenizer.from_pretrained(reference / "checkpoint")
    assert tokenizer.decode(tokenizer("the quick brown fox")["input_ids"]) == "the quick brown fox"
    assert AutoModelForCausalLM.from_pretrained(reference / "best") is not None


def test_checkpoints_have_a_model_card(reference: Path) -> None:
    card = (reference / "checkpoint/README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert f"{STEPS} steps, started at random" in card
    assert "[es]" in card


def test_a_finished_run_is_not_run_again(recipe: Path, reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(reference)
    assert training.main([str(recipe), "--set", f"run.dir={reference}"]) == 2
    assert f"{reference}: holds a run already; go on with it by --resume" in capsys.readouterr().err
    assert digest(reference) == before

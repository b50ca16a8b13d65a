"""Bad input through the command: one clear message that names the file or key, exit code 2 or 1, and nothing touched.

What is found before workers start is tested in this process; the rest, and a few of each kind, by the real command.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from support import (
    RECIPE,
    ROOT,
    TINY,
    arguments,
    contents,
    digest,
    export_digest,
    finished_run,
    left,
    leftovers,
    start,
    train,
    write_recipe,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from es_lite import plan
from es_lite import recipe as recipes
from es_lite import train as training
from es_lite.algorithm.jit import Threads
from es_lite.errors import RunError
from es_lite.runs.export import export
from es_lite.runs.journal import Journal
from es_lite.runs.metrics import Metrics
from es_lite.runs.origin import Origin
from es_lite.weights import store
from es_lite.weights.layout import Layer

STEPS = 12

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = {"iterations": STEPS, "checkpoint_every": 4, "checkpoint_dtype": "fp32"}
    return write_recipe(tmp_path_factory.mktemp("recipe"), run=run)


@pytest.fixture(scope="module")
def reference(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    return finished_run(recipe, tmp_path_factory.mktemp("reference") / "run")


@pytest.fixture
def run(reference: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, as if it had been made where it is."""
    return copy_of(reference, tmp_path / "run")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved_model: Path, tmp_path: Path) -> Path:
    """A good model folder, to be broken."""
    return Path(shutil.copytree(saved_model, tmp_path / "model"))


def copy_of(run: Path, place: Path) -> Path:
    shutil.copytree(run, place)
    recipe = place / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(run), str(place)))
    return place


def refused(capsys: Capture, recipe: Path, run: Path, *overrides: str, resume: bool = False) -> str:
    """The message of a command that ends with exit code 2."""
    capsys.readouterr()
    assert training.main(arguments(recipe, run, *overrides, resume=resume)) == 2
    return message_of(capsys.readouterr().err)


def message_of(err: str) -> str:
    assert err.startswith("es_lite: ")
    assert err.count("es_lite: ") == 1 and "Traceback" not in err
    return err


def refused_untouched(capsys: Capture, recipe: Path, run: Path, *overrides: str) -> str:
    """The message of a --resume that is refused and leaves the run directory byte for byte."""
    before = contents(run)
    message = refused(capsys, recipe, run, *overrides, resume=True)
    assert contents(run) == before
    return message


# The recipe


def test_all_mistakes_of_a_recipe_are_listed_at_once(tmp_path: Path) -> None:
    """By the real command: unknown tables and keys, wrong types, impossible values, each with what to do."""
    recipe = write_recipe(
        tmp_path, es={"sigmma": 1e-3, "alpha": "fast", "population": 3}, fittness={"samples": 4}, noise={"kind": "gausian"}
    )
    finished = train(recipe, tmp_path / "run", "workers.cont=2", "es.sigma=0")
    message = message_of(finished.err)
    assert finished.code == 2
    assert f"{recipe}: 6 problems" in message
    assert 'es.sigmma: unknown key; did you mean "sigma"?' in message
    assert "es.alpha = 'fast': expected a number" in message
    assert 'fittness: unknown table; did you mean "fitness"?' in message
    assert "noise.kind = 'gausian': expected 'gaussian'; did you mean \"gaussian\"?" in message
    assert 'workers.cont: unknown key; did you mean "count"?' in message
    assert "es.sigma = 0.0: expected greater than 0" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("es.sigma=-1e-3", "es.sigma = -0.001"),
        ("es.sigma=nan", "es.sigma = nan"),
        ("es.alpha=inf", "es.alpha = inf"),
        ("es.population=1", "es.population = 1"),
        ("es.population=5", "es.population = 5: must be even with es.antithetic"),
        ("es.population=true", "es.population = True"),
        ("es.population=4.5", "es.population = 4.5"),
        ("es.alpha_decay=0", "es.alpha_decay = 0.0"),
        ("es.shaping=rnk", "es.shaping = 'rnk'"),
        ("run.seed=-1", "run.seed = -1"),
        ("run.seed=18446744073709551616", "run.seed = 18446744073709551616"),
        ("run.iterations=-1", "run.iterations = -1"),
        ("fitness.samples=0", "fitness.samples = 0"),
        ("fitness.max_length=1", "fitness.max_length = 1"),
        ("fitness.micro_batch=0", "fitness.micro_batch = 0"),
        ("data.vocab_size=256", "data.vocab_size = 256"),
        ("workers.count=0", "workers.count = 0"),
        ("workers.count=many", "workers.count = 'many'"),
        ("memory.limit=lots", "memory.limit = 'lots'"),
        ("eval.fraction=1", "eval.fraction = 1.0"),
        ('es.groups=[{pattern="("}]', "es.groups[0].pattern = '('"),
        ('es.groups=[{patern="mlp"}]', "es.groups[0].patern"),
        ("model.path=some/model", "model: give one of model.path and model.config, not both"),
        ("model.config=qwen3-1b", "model.config = 'qwen3-1b'"),
        ("data.tokenizer=", "data.tokenizer"),
        ("es=3", "--set es=3"),
        ("es.sigma", "--set es.sigma"),
    ],
)
def test_impossible_values_are_refused_by_name(recipe: Path, tmp_path: Path, capsys: Capture, override: str, named: str) -> None:
    assert named in refused(capsys, recipe, tmp_path / "run", override)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_missing_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert f"{tmp_path}/gone.toml: no such recipe" in refused(capsys, tmp_path / "gone.toml", tmp_path / "run")


@pytest.mark.parametrize("content", [b"[es\nsigma = 1", b"\xff\xfe", b"\x7fELF\0\0"])
def test_a_recipe_that_is_not_toml_is_named(tmp_path: Path, capsys: Capture, content: bytes) -> None:
    recipe = tmp_path / "bad.toml"
    recipe.write_bytes(content)
    assert f"{recipe}: not valid TOML" in refused(capsys, recipe, tmp_path / "run")


def test_a_recipe_that_is_a_folder_is_named(tmp_path: Path, capsys: Capture) -> None:
    assert f"{tmp_path}: cannot be read" in refused(capsys, tmp_path, tmp_path / "run")


# The model's configuration


@pytest.mark.parametrize(
    "broken",
    [
        {"model_type": "quen3"},
        {"model_type": "vit"},
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"hidden_size": "wide"},
        {"hidden_act": "no-such-activation"},
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_model_is_refused(tmp_path: Path, capsys: Capture, broken: dict) -> None:
    recipe = write_recipe(tmp_path, model={"config": TINY | broken})
    assert "model.config" in refused(capsys, recipe, tmp_path / "run")


# Data


def test_more_samples_a_step_than_there_are_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "fitness.samples = 100000: the corpus has only" in refused(capsys, recipe, tmp_path / "run", "fitness.samples=100000")


def test_a_refused_run_leaves_no_tokenizer_that_the_next_would_take(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    message = refused(capsys, recipe, tmp_path / "run", "data.vocab_size=300")
    assert "data.tokenizer: makes the token" in message and "the model's vocab_size is 257" in message
    assert "fitness.samples" in refused(capsys, recipe, tmp_path / "run", "fitness.samples=100000")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "there is no text in it"),
        ("blank.txt", b"\n \n\n", "there is no text in it"),
        ("binary.txt", b"\x7fELF\x02\x01\0\0\0", "NUL byte"),
        ("latin.txt", "é".encode("latin-1") * 100, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text":\n', ":2: not JSON"),
        ("column.jsonl", b'{"body": "a"}\n', 'expected an object with a string under "text"'),
        ("model.bin", b"text", "unknown kind of file"),
    ],
)
def test_data_that_cannot_be_used_is_named(
    recipe: Path, tmp_path: Path, capsys: Capture, name: str, content: bytes, reason: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for key in ("data.path", "eval.path"):
        message = refused(capsys, recipe, tmp_path / "run", f"{key}={path}", "eval.every=1")
        assert str(path) in message and reason in message
    assert path.read_bytes() == content


def test_data_that_is_missing_is_named(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert f'"{tmp_path}/gone.txt": no such file' in refused(capsys, recipe, tmp_path / "run", f"data.path={tmp_path}/gone.txt")


# The model's folder


def no_weights(folder: Path) -> str:
    (folder / "model.safetensors").unlink()
    return f"{folder}: no safetensors files"


def only_a_pickle(folder: Path) -> str:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "a pickle, which es_lite never loads"


def no_configuration(folder: Path) -> str:
    (folder / "config.json").unlink()
    return f"{folder}/config.json: missing"


def configuration_that_is_no_json(folder: Path) -> str:
    (folder / "config.json").write_text("{")
    return f"{folder}/config.json: cannot be read as JSON"


def configuration_of_another_shape(folder: Path) -> str:
    change_configuration(folder, intermediate_size=48)
    return (
        f"{folder}/model.safetensors: model.layers.0.mlp.gate_proj.weight has shape [64, 32], but config.json makes it [48, 32]"
    )


def configuration_with_a_layer_more(folder: Path) -> str:
    change_configuration(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    return "has the tensor model.layers.2."


def truncated(folder: Path) -> str:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    return f"{path}: truncated or not a safetensors file"


def truncated_to_nothing(folder: Path) -> str:
    os.truncate(folder / "model.safetensors", 0)
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def header_that_is_no_json(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:8] + b"[" + path.read_bytes()[9:])
    return f"{path}: truncated or not a safetensors file"


def header_longer_than_the_file(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    return f"{path}: truncated or not a safetensors file"


def offsets_that_overlap(folder: Path) -> str:
    change_header(folder, lambda header: header["model.norm.weight"].update(data_offsets=[0, 128]))
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def offsets_outside_the_file(folder: Path) -> str:
    change_header(folder, lambda header: header["model.norm.weight"].update(data_offsets=[2**40, 2**40 + 128]))
    return f"{folder}/model.safetensors: truncated or not a safetensors file"


def tensor_missing(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    return f"{folder}: no safetensors file in it has the tensor model.norm.weight"


def tensor_of_whole_numbers(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    return f"{folder}/model.safetensors: tensors of type I8 cannot be used"


def index_of_a_missing_file(folder: Path) -> str:
    write_index(folder, "model-00001-of-00002.safetensors")
    return f"{folder}/model-00001-of-00002.safetensors"


def index_that_leads_outside(folder: Path) -> str:
    shutil.copy(folder / "model.safetensors", folder.parent)
    write_index(folder, "../model.safetensors")
    return f"{folder}/model.safetensors.index.json: names files outside its folder"


def index_that_is_none(folder: Path) -> str:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model.safetensors", 3]}')
    return f"{folder}/model.safetensors.index.json"


def change_configuration(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_header(folder: Path, change: Callable[[dict], None]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def write_index(folder: Path, file: str) -> None:
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, file)}))


@pytest.mark.parametrize(
    "break_it",
    [
        no_weights,
        only_a_pickle,
        no_configuration,
        configuration_that_is_no_json,
        configuration_of_another_shape,
        configuration_with_a_layer_more,
        truncated,
        truncated_to_nothing,
        header_that_is_no_json,
        header_longer_than_the_file,
        offsets_that_overlap,
        offsets_outside_the_file,
        tensor_missing,
        tensor_of_whole_numbers,
        index_of_a_missing_file,
        index_that_leads_outside,
        index_that_is_none,
    ],
    ids=lambda function: function.__name__,
)
def test_a_broken_model_folder_is_refused(model: Path, tmp_path: Path, capsys: Capture, break_it: Callable[[Path], str]) -> None:
    expected = break_it(model)
    recipe = write_recipe(tmp_path, model={"config": "", "path": str(model)})
    before = contents(model)
    assert expected in refused(capsys, recipe, tmp_path / "run")
    assert contents(model) == before
    assert not (tmp_path / "run/journal.jsonl").exists()


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: Capture) -> None:
    recipe = write_recipe(tmp_path, model={"config": "", "path": f"{tmp_path}/gone"})
    assert f"model.path = '{tmp_path}/gone': no such folder" in refused(capsys, recipe, tmp_path / "run")


@pytest.mark.slow
def test_weights_that_are_not_finite_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, model / "model.safetensors")
    recipe = write_recipe(tmp_path, model={"config": "", "path": str(model)})
    finished = train(recipe, tmp_path / "run")
    assert finished.code == 2
    expected = f"{model}/model.safetensors: model.layers.1.mlp.up_proj.weight has values that are not finite"
    assert expected in message_of(finished.err)
    assert leftovers(tmp_path / "run") == []


# The run directory


def test_the_run_of_another_recipe_is_refused(recipe: Path, run: Path, capsys: Capture) -> None:
    message = refused_untouched(capsys, recipe, run, "es.alpha=0.5", "run.seed=3")
    assert f"{run}: belongs to another recipe" in message
    assert "es.alpha: 0.02 -> 0.5" in message and "run.seed: 0 -> 3" in message


@pytest.mark.slow
def test_the_directory_of_a_live_run_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    with start(recipe, tmp_path / "run", "run.iterations=100000") as live:
        live.wait_for_records(1)
        for resume in (False, True):
            message = refused(capsys, recipe, tmp_path / "run", "run.iterations=100000", resume=resume)
            assert f"{tmp_path}/run: in use by a live run" in message
        live.wait_for_records(live.records() + 2)


def test_a_folder_of_other_things_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    assert f"{tmp_path}/mine: is there already and is not a run directory" in refused_untouched(capsys, recipe, tmp_path / "mine")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_is_no_run_directory(recipe: Path, tmp_path: Path, capsys: Capture, place: str) -> None:
    (tmp_path / "file").write_text("mine")
    assert str(tmp_path / place) in refused(capsys, recipe, tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


# Journal and master


@pytest.mark.parametrize(
    ("override", "words"), [("run.seed=1", "other values"), ("model.config.hidden_size=64", "other names or shapes")]
)
def test_the_journal_of_another_model_is_refused(recipe: Path, run: Path, capsys: Capture, override: str, words: str) -> None:
    document = (
        {**RECIPE, "run": {"seed": 1}} if "seed" in override else {**RECIPE, "model": {"config": TINY | {"hidden_size": 64}}}
    )
    other = write_recipe(run.parent, **document)
    journal = run / "journal.jsonl"
    journal.unlink()
    origin = Origin.of_recipe(recipes.load(other))
    skeleton, layout = origin.skeleton()
    Journal.create(journal, origin.header(layout, origin.source(skeleton, layout, Threads(1))))
    message = refused_untouched(capsys, recipe, run)
    assert f"{journal}: is the journal of another model" in message and words in message


def one_bit_flipped(lines: list[bytes]) -> None:
    lines[2] = lines[2].replace(b'"sigma":0.02', b'"sigma":0.03')


def line_lost(lines: list[bytes]) -> None:
    del lines[2]


def lines_swapped(lines: list[bytes]) -> None:
    lines[2], lines[3] = lines[3], lines[2]


def zeros_in_the_middle(lines: list[bytes]) -> None:
    lines[2] = b"\0" * (len(lines[2]) - 1) + b"\n"


def line_torn_in_the_middle(lines: list[bytes]) -> None:
    lines[2] = lines[2][:40]


@pytest.mark.parametrize(
    "damage",
    [one_bit_flipped, line_lost, lines_swapped, zeros_in_the_middle, line_torn_in_the_middle],
    ids=lambda function: function.__name__,
)
def test_a_journal_with_a_broken_middle_is_refused(
    recipe: Path, run: Path, capsys: Capture, damage: Callable[[list[bytes]], None]
) -> None:
    journal = run / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    damage(lines)
    journal.write_bytes(b"".join(lines))
    message = refused_untouched(capsys, recipe, run, f"run.iterations={STEPS + 5}")
    assert f"{journal}: line 3 is damaged" in message
    assert "restore the file" in message


@pytest.mark.parametrize("content", [b"not a journal\n", b"", b'{"format":"es_lite', b"\x7fELF\0\n"])
def test_something_else_in_the_journals_place_is_refused(recipe: Path, run: Path, capsys: Capture, content: bytes) -> None:
    (run / "journal.jsonl").write_bytes(content)
    assert f"{run}/journal.jsonl: " in refused_untouched(capsys, recipe, run)


def test_a_master_ahead_of_the_journal_is_refused(recipe: Path, run: Path, capsys: Capture) -> None:
    journal = run / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-2]))
    message = refused_untouched(capsys, recipe, run)
    assert f"{run}/master: a layer stands at step {STEPS}, but {journal} ends at step {STEPS - 2}" in message
    assert f"remove {run}/master" in message


@pytest.mark.parametrize("size", [0, 20, 30000])
def test_a_truncated_master_file_is_named_with_what_to_do(recipe: Path, run: Path, capsys: Capture, size: int) -> None:
    file = run / "master/block-000.safetensors"
    whole = file.stat().st_size
    os.truncate(file, size)
    message = refused_untouched(capsys, recipe, run)
    assert f"{file}: has {size:,} bytes where block-000 takes {whole:,}" in message
    assert "add --rebuild to --resume" in message


def test_a_master_file_of_another_layer_is_named_with_what_to_do(recipe: Path, run: Path, capsys: Capture) -> None:
    file = run / "master/embedding.safetensors"
    shutil.copy(run / "master/block-000.safetensors", file)
    message = refused_untouched(capsys, recipe, run)
    assert re.search(rf"{file}: has [0-9,]+ bytes where embedding takes [0-9,]+; add --rebuild to --resume", message)


def test_a_master_file_of_another_layer_of_the_same_size_is_named_with_what_to_do(
    recipe: Path, run: Path, capsys: Capture
) -> None:
    file = run / "master/block-000.safetensors"
    shutil.copy(run / "master/block-001.safetensors", file)
    message = refused_untouched(capsys, recipe, run)
    assert f"{file}: is not block-000 of this model in fp32 but ('block-001', 'fp32'); add --rebuild to --resume" in message


@pytest.mark.parametrize("at", [0, 8, 20])
def test_a_master_file_with_a_broken_header_is_named_with_what_to_do(recipe: Path, run: Path, capsys: Capture, at: int) -> None:
    """at: the byte that changes, of the header's length or of the header."""
    file = run / "master/block-000.safetensors"
    change_byte(file, at)
    assert f"{file}: its header is damaged, or of another version; add --rebuild to --resume" in refused_untouched(
        capsys, recipe, run
    )


@pytest.mark.slow
def test_a_bit_that_changed_in_a_master_file_is_found_and_with_rebuild_the_run_goes_on(
    recipe: Path, run: Path, reference: Path, capsys: Capture
) -> None:
    file = run / "master/block-000.safetensors"
    change_byte(file, file.stat().st_size - 5)
    message = refused_untouched(capsys, recipe, run)
    assert f"{file}: its checksum does not agree: bits in it have changed; add --rebuild to --resume" in message
    os.truncate(run / "master/final.safetensors", 20)
    assert training.main(arguments(recipe, run, resume=True, rebuild=True)) == 0
    out = capsys.readouterr().out
    for damaged in (file, run / "master/final.safetensors"):
        assert f"removed, to be made again from θ₀ and the journal: {damaged}" in out
    assert out.count("removed") == 2
    assert digest(run) == digest(reference)


def change_byte(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 4
    file.write_bytes(data)


# Memory and disk


def test_too_little_memory_is_said_before_anything_is_made(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    message = refused(capsys, recipe, tmp_path / "run", "memory.limit=500 MiB")
    assert re.search(r"needs [0-9.]+ GiB of memory, there are 0.49 \(memory.limit of the recipe\)", message)
    assert "workers.count" in message and "coordinator" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("residency", "part"), [("resident", "working copy"), ("streamed", "window"), ("auto", "window")])
def test_the_plan_of_what_does_not_fit_ends_with_exit_code_2(recipe: Path, tmp_path: Path, residency: str, part: str) -> None:
    """`auto`: the plan is that of streaming, which needs the least."""
    settings = (f"run.dir={tmp_path}/run", "memory.limit=500 MiB", f"memory.residency={residency}")
    overrides = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "es_lite.plan", str(recipe), *overrides]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert planned.returncode == 2
    assert part in planned.stdout
    assert "GiB of memory, there are 0.49 (memory.limit of the recipe)" in message_of(planned.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_where_there_is_none_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "torch finds no GPU here" in refused(capsys, recipe, tmp_path / "run", "workers.device=cuda")
    assert not (tmp_path / "run").exists()


def test_the_plan_of_a_bad_recipe_is_refused(recipe: Path, capsys: Capture) -> None:
    assert plan.main([str(recipe), "--set", "es.sigma=0"]) == 2
    assert "es.sigma = 0.0: expected greater than 0" in message_of(capsys.readouterr().err)


@contextmanager
def mounted(point: Path, *options: str) -> Iterator[Path]:
    """A file system of its own at `point`; skips the test where mounting is not allowed."""
    point.mkdir()
    made = subprocess.run(["mount", *options, str(point)], capture_output=True, text=True) if shutil.which("mount") else None
    if made is None or made.returncode:
        pytest.skip(f"needs to mount a file system: {made.stderr.strip() if made else 'no mount command'}")
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_read_only_directory_is_named(recipe: Path, reference: Path, tmp_path: Path, capsys: Capture, resume: bool) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=8m", "tmpfs") as disk:
        run = copy_of(reference, disk / "run") if resume else disk / "run"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        before = contents(disk)
        message = refused(capsys, recipe, run, resume=resume)
        assert f"{run}: cannot be written (Read-only file system); choose another run.dir" in message
        assert contents(disk) == before


def test_a_disk_too_small_for_the_plan_is_said_before_anything_is_made(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=64k", "tmpfs") as disk:
        assert "GiB of disk" in refused(capsys, recipe, disk / "run")
        assert contents(disk) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("free", "board", "named"),
    [(8, True, "master"), (230, False, "checkpoint")],
)
def test_a_disk_that_fills_up_ends_the_run_and_with_more_space_it_goes_on(
    recipe: Path, reference: Path, tmp_path: Path, free: int, board: bool, named: str
) -> None:
    """free: KiB left once the run has begun; named: what cannot be written then."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
        run = disk / "run"
        with start(recipe, run, f"log.tensorboard={str(board).lower()}", log=tmp_path / "log") as live:
            live.wait_until(lambda: "bringing the weights level" in live.out)
            fill(disk, leaving=free)
            finished = live.finish()
            assert left(live.process.pid) == []
        assert finished.code == 1
        assert f"{run}/{named}" in message_of(finished.err)
        assert "No space left on device" in finished.err
        subprocess.run(["mount", "-o", "remount,size=6m", str(disk)], check=True)
        assert train(recipe, run, resume=True).code == 0
        assert digest(run) == digest(reference)
        assert export_digest(run) == export_digest(reference)
        assert leftovers(run) == []


@pytest.mark.parametrize("free", [0, 4, 8, 12, 16])
def test_a_disk_that_is_full_before_the_first_step_is_said(
    recipe: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    """free: KiB left. Too little for the plan, so let that pass, as if the disk had filled up just after."""
    monkeypatch.setattr(plan, "shortfall", lambda planned: None)
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        fill(disk, leaving=free)
        assert training.main(arguments(recipe, disk / "run")) in (1, 2)
        message = message_of(capsys.readouterr().err)
        assert f"{disk}/run" in message and "No space left on device" in message
        assert not (disk / "run/journal.jsonl").exists()


@pytest.mark.parametrize("free", range(96, 140, 4))
def test_an_export_is_whole_or_absent_however_full_the_disk(recipe: Path, reference: Path, tmp_path: Path, free: int) -> None:
    """free: KiB left, from too little for the weights to enough for all files."""
    origin = Origin.of_recipe(recipes.load(recipe))
    skeleton, layout = origin.skeleton()
    files = origin.files(reference / "master", layout)
    tokenizer = AutoTokenizer.from_pretrained(reference / "tokenizer")

    def opened(layer: Layer) -> store.Finished:
        return store.Finished(files[layer.index], [], STEPS, Threads(1))

    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        fill(disk, leaving=free)
        try:
            export(disk / "checkpoint", skeleton, layout, opened, tokenizer, "fp32", "card", {"step": STEPS})
        except RunError as error:
            assert f"{disk}/checkpoint: cannot be written" in str(error)
            assert [path.name for path in disk.iterdir()] == ["filler"]
        else:
            assert load_file(disk / "checkpoint/model.safetensors")
            assert (disk / "checkpoint/es_lite.json").stat().st_size


def test_metrics_on_a_full_disk_end_the_run_also_with_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs") as disk:
        metrics = Metrics(disk / "metrics.jsonl", tensorboard=True)
        metrics.write({"step": 0, "score_mean": 1.0})
        fill(disk, leaving=0)
        with pytest.raises(RunError, match=f"{disk}.*cannot be written"):
            for step in range(1, 500):
                metrics.write({"step": step} | dict.fromkeys("abcdefgh", 1.0))


def fill(disk: Path, leaving: int) -> None:
    """Takes all the disk's space but `leaving` KiB."""
    state = os.statvfs(disk)
    (disk / "filler").write_bytes(b"0" * (state.f_bavail * state.f_frsize - leaving * 1024))


# What would quietly make a run something else


def test_a_group_that_matches_no_parameter_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    message = refused(capsys, recipe, tmp_path / "run", 'es.groups=[{pattern = "norms", sigma = 0, alpha = 0}]')
    assert "es.groups[0].pattern = 'norms': matches no parameter" in message
    assert not (tmp_path / "run").exists()


def test_samples_longer_than_the_model_reaches_are_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    overrides = ("model.config.max_position_embeddings=16",)
    assert "fitness.max_length = 32" in refused(capsys, recipe, tmp_path / "run", *overrides)


def test_an_override_inside_what_is_no_table_is_refused(recipe: Path, tmp_path: Path, capsys: Capture) -> None:
    overrides = ("model.config=qwen3-0.5b", "model.config.hidden_size=32")
    assert "config is not a table" in refused(capsys, recipe, tmp_path / "run", *overrides)


@pytest.mark.slow
def test_a_text_that_changed_since_the_run_began_is_refused(recipe: Path, run: Path, capsys: Capture) -> None:
    text = recipe.parent / "text.txt"
    before = text.read_text()
    text.write_text(before + "One line more.\n")
    try:
        assert f"{text}: the text or its tokenizer has changed" in refused_untouched(capsys, recipe, run)
    finally:
        text.write_text(before)


@pytest.mark.slow
def test_layers_without_their_journal_are_refused(recipe: Path, run: Path, capsys: Capture) -> None:
    (run / "journal.jsonl").unlink()
    assert f"there is no {run / 'journal.jsonl'}" in refused_untouched(capsys, recipe, run)

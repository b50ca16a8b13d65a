"""Which causal models of transformers es_lite trains exactly, and which it refuses: writes docs/models.md.

    python tools/model_table.py [NAME ...]      verdicts on the terminal
    python tools/model_table.py --write         all of them, into docs/models.md

Each small model is saved by transformers and opened by es_lite, from memory and streamed; its scores under perturbations of full
and of low-rank noise are compared with those of transformers' own forward, sample by sample, of a model whose weights were
perturbed by hand; and what es_lite exports is loaded by transformers again.
"""

import argparse
import contextlib
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from _small_models import VARIANTS, small, types
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from es_lite.algorithm.jit import Threads
from es_lite.algorithm.noise.kinds import kind_of
from es_lite.algorithm.noise.place import Place
from es_lite.data.batch import Batch
from es_lite.errors import UserError
from es_lite.fitness.kinds import fitness_of
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.planning.plan import Plan
from es_lite.recipe import Recipe
from es_lite.runs.export import export
from es_lite.scoring.lanes import Lanes
from es_lite.scoring.model import PerturbedModel
from es_lite.scoring.perturbation import Perturbation
from es_lite.scoring.rehearsal import rehearse
from es_lite.tables import FitnessTable, GenerationTable, RunTable
from es_lite.weights import working_copy
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.reading import LayerReader
from es_lite.weights.store import Store, advance_layer
from es_lite.weights.stream import Stream
from es_lite.weights.working_copy import WorkingCopy

PAGE = Path(__file__).parents[1] / "docs/models.md"

TOLERANCE = 2e-5
"""Of a mean log-probability, in nats."""

LARGEST = 30_000_000
"""Parameters; what has more with these configurations is not small."""

SECONDS = 600

LENGTHS = [20, 17, 9, 4, 2]
NOISE = {"gaussian": 0, "lowrank": 2}
ONE = Threads(1)


@dataclass(frozen=True)
class Verdict:
    name: str
    kind: str
    """"exact", "refused", "wrong", "traceback", or "not tried"."""
    why: str = ""


def configurations() -> dict[str, tuple[str, dict]]:
    """By name: the model type, and what is changed."""
    return {kind: (kind, {}) for kind in types()} | VARIANTS


def judge(name: str) -> Verdict:
    """Tries one configuration."""
    kind, changes = configurations()[name]
    try:
        with _silent(), _limited():
            config = small(kind, **changes)
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
            if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
                return Verdict(name, "not tried", "has no small configuration here")
            with torch.no_grad():
                model(input_ids=torch.arange(10, 20)[None], use_cache=False)
    except Exception as error:
        return Verdict(name, "not tried", f"has no small configuration here ({_first(error)})")
    try:
        with tempfile.TemporaryDirectory() as folder, _silent(), _limited():
            problem = _compare(model, Path(folder))
    except UserError as error:
        return Verdict(name, "refused", str(error).replace(folder, "FOLDER"))
    except Exception as error:
        return Verdict(name, "traceback", _first(error))
    return Verdict(name, "wrong", problem) if problem else Verdict(name, "exact")


def _compare(model: PreTrainedModel, folder: Path) -> str:
    """What is wrong; "" if nothing is. Raises UserError if es_lite refuses the model."""
    _fill(model)
    model.save_pretrained(folder / "model")
    origin = Origin(str(folder / "model"), "", 0, (), False, False)
    skeleton, layout = origin.skeleton()
    for kind, rank in NOISE.items():
        rehearse(skeleton, layout, kind_of(kind, rank), writes=False)
    _plan(skeleton, layout, folder)
    source = origin.source(skeleton, layout, ONE)
    own = {name: value.detach().clone() for name, value in model.named_parameters()}
    for tensor in layout.tensors:
        if not np.array_equal(source.read(tensor, 0, tensor.size), own[tensor.name].numpy().ravel()):
            return f"{tensor.name} is not read as transformers reads it"
    store = Store(folder / "store", layout, "fp32")
    store.folder.mkdir()
    working = WorkingCopy(layout, "bf16", working_copy.allocate(layout, "bf16"))
    for file in store.files:
        advance_layer(file, lambda: source, [], 0, working, ONE)
    batch = _batch(model.config.get_text_config().vocab_size)
    for kind, rank in NOISE.items():
        both = Perturbation(seed=7, step=3, pair=1, sigma=0.0123, signs=(1, -1), kind=kind, rank=rank)
        expected = np.stack([_hugging_face(model, own, layout, both, sign, batch) for sign in both.signs])
        weights_of: dict[str, WorkingCopy | Stream] = {"": working}
        if not layout.blocks_share:  # the plan refuses these
            weights_of[", streamed"] = stream = Stream(store.files, layout, "bf16", ONE, False)
            stream.advance([], 0)
        for where, weights in weights_of.items():
            proxied = PerturbedModel(
                origin.skeleton()[0], layout, weights, torch.float32, Lanes(1, 1), micro_batch=2, tile_members=2
            )
            found = proxied.log_probabilities([both], batch, len(batch))
            if not np.abs(found - expected).max() < TOLERANCE:
                return f"{kind} noise{where}: differs by {np.abs(found - expected).max():.3g} nats"
    for name, value in own.items():
        model.get_parameter(name).data = value
    return _exported(model, origin, folder, skeleton, layout)


def _plan(skeleton: PreTrainedModel, layout: Layout, folder: Path) -> None:
    """Plans a run of each fitness in the folder; one that needs what the model cannot do is refused, which is not the verdict."""
    for kind in ("logprob", "reward"):
        fitness = FitnessTable(kind=kind, max_length=16, samples=2, micro_batch=1)
        run = RunTable(dir=str(folder))  # whose size is counted
        recipe = Recipe(run=run, fitness=fitness, generation=GenerationTable(max_new_tokens=8))
        with contextlib.suppress(UserError):
            Plan.of(recipe, fitness_of(kind), skeleton.config, layout)


def _exported(model: PreTrainedModel, origin: Origin, folder: Path, skeleton: PreTrainedModel, layout: Layout) -> str:
    source = origin.source(skeleton, layout, ONE)

    def layer(layer):  # type: ignore[no-untyped-def]
        return LayerReader.of_theta_0(LayerFormat(layer, "fp32"), source, [], ONE)

    export(folder / "export", skeleton, layout, layer, None, "fp32", "", {"step": 0})
    state = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).state_dict()
    different = [name for name, value in model.state_dict().items() if not torch.equal(state[name].float(), value.float())]
    return f"{different[0]} is another after its export" if different else ""


def _fill(model: PreTrainedModel) -> None:
    """Gives parameters values that show mistakes; they are numbers of bfloat16, as the working copy has them."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        matrix = parameter.dim() > 1 or name.endswith("bias")
        values = parameter.data + 0.1 * noise if matrix else parameter.data + 0.05 * noise
        parameter.data = values.bfloat16().float()


def _batch(vocabulary: int) -> Batch:
    random = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[:length] = random.integers(2, min(vocabulary, 300), length)
    return Batch(tokens, np.array(LENGTHS, np.int32))


@torch.no_grad()
def _hugging_face(
    model: PreTrainedModel, own: dict[str, torch.Tensor], layout: Layout, both: Perturbation, sign: int, batch: Batch
) -> np.ndarray:
    """Mean log-probability of each sample, alone and unpadded, by the model that is perturbed by hand."""
    for tensor in layout.tensors:
        place = Place(both.seed, both.step, both.pair, tensor.number)
        epsilon = both.noise.epsilon(place, tensor.shape, 0, tensor.size)
        sigma = np.float32(sign * both.sigma * tensor.sigma_factor)
        model.get_parameter(tensor.name).data = own[tensor.name] + torch.from_numpy(sigma * epsilon).view(tensor.shape)
    means = []
    for row, length in zip(batch.tokens, batch.lengths, strict=True):
        ids = torch.from_numpy(row[:length].astype(np.int64))
        values = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
        means.append(values.gather(1, ids[1:, None]).mean().item())
    return np.array(means)


def page(verdicts: list[Verdict]) -> str:
    """docs/models.md."""
    exact = [v for v in verdicts if v.kind == "exact"]
    refused = [v for v in verdicts if v.kind == "refused"]
    other = [v for v in verdicts if v.kind not in ("exact", "refused")]
    lines = [
        f"# Models: {len(exact)} of {len(verdicts) - len(other)} configurations exact, {len(refused)} refused",
        "",
        f"Every causal model type of transformers {transformers.__version__} that can be built small, and variants of some, as",
        "`python tools/model_table.py --write` finds them. A long test checks this page.",
        "",
        "- **Exact**: read from a folder that transformers saved, and scored from memory and streamed, under full and low-rank",
        f"  noise, to {TOLERANCE:g} nats of what transformers' own forward scores when its weights are perturbed by hand; and",
        "  transformers loads the same model from what is exported.",
        "- **Refused**: in one sentence, before anything is loaded or written.",
        "",
        "## Exact",
        "",
        ", ".join(f"`{v.name}`" for v in exact),
        "",
        "## Refused",
        "",
        "| configuration | why |",
        "|---|---|",
        *(f"| `{v.name}` | {v.why.replace('|', '/')} |" for v in refused),
        "",
        "## Not tried",
        "",
        "| configuration | why |",
        "|---|---|",
        *(f"| `{v.name}` | {v.why.replace('|', '/')} |" for v in other),
    ]
    return "\n".join(lines) + "\n"


def _first(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Ends what takes too long."""

    def late(*_: object) -> None:
        raise TimeoutError(f"takes more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Which causal models es_lite trains exactly, and which it refuses.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="configurations; default: all")
    parser.add_argument("--write", action="store_true", help="write docs/models.md")
    arguments = parser.parse_args()
    if arguments.write and arguments.names:
        parser.error("--write takes all configurations, and no NAME")
    if unknown := set(arguments.names) - configurations().keys():
        parser.error(f"no such configuration: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    verdicts = []
    for name in arguments.names or configurations():
        verdicts.append(judge(name))
        print(name, verdicts[-1].kind, verdicts[-1].why, flush=True)
    if arguments.write:
        PAGE.write_text(page(verdicts), encoding="utf-8")
    return any(v.kind in ("wrong", "traceback") for v in verdicts)


if __name__ == "__main__":
    sys.exit(main())

"""The command `replay`: computes a run's weights from θ₀ and its journal, bit for bit, as a Hugging Face folder.

    python -m es_lite.replay RUN --out DIR [--model PATH] [--step T] [--dtype bf16|fp32]

RUN is a run directory, or a journal alone (a fine-tune shared as a file of kilobytes). A random θ₀ comes from the journal's seed;
a pretrained one from where the run found it, or from --model, and must be identical. Of the run directory's other files, only the
recipe's data.tokenizer and the tokenizer that the run trained are used.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from es_lite.algorithm.jit import Threads
from es_lite.data.tokenizer import load_tokenizer
from es_lite.errors import UserError
from es_lite.files import beside
from es_lite.model.layout import Layer
from es_lite.model.origin import Origin
from es_lite.recipe import Recipe
from es_lite.runs.export import export, model_card
from es_lite.runs.journal import Journal
from es_lite.system import cores
from es_lite.tables import DataTable
from es_lite.terminal import accept_any_text, exit_code_of
from es_lite.weights.layer_format import LayerFormat
from es_lite.weights.reading import LayerReader


def replay(run: Path, out: Path, model_path: str = "", steps: int | None = None, dtype: str = "bf16") -> None:
    """Writes the model after `steps` steps (by default, all in the journal) to the folder `out`.

    Raises UserError if the journal is damaged, if θ₀ is not the one that it began with, or if `out`, or what it is made beside,
    exists.
    """
    journal = Journal.open(run / "journal.jsonl" if run.is_dir() else run)
    records = journal.until(steps)
    out = out.absolute()
    for taken in (out, *(beside(out) if out.name else ())):
        if taken.exists():
            raise UserError(f"{taken}: exists already; remove it, or choose another folder for --out")
    origin = Origin.of_header(journal.header, journal.path).moved(model_path)
    model, layout = origin.skeleton()
    threads = Threads(cores())
    theta_0 = origin.source(model, layout, threads)
    origin.check(journal.header, journal.path, layout, theta_0)

    def reader(layer: Layer) -> LayerReader:
        return LayerReader.of_theta_0(LayerFormat(layer, origin.storage), theta_0, records, threads)

    tokenizer = _tokenizer(run, origin)
    if tokenizer is None:
        print(f"es_lite: no tokenizer was found; copy the run's into {out}", file=sys.stderr)
    card = model_card(len(records), "", origin.path, "")
    export(out, model, layout, reader, tokenizer, dtype, card, {"step": len(records)})


def _tokenizer(run: Path, origin: Origin) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the run's recipe names, or the model's own; None if it is not there, as with a journal alone."""
    trained = (run / "tokenizer").is_dir()
    try:
        table = Recipe.load(run / "recipe.toml").data
    except UserError:  # there is none, or it is damaged
        table = DataTable(tokenizer="bpe" if trained else "")
    lost = not trained if table.tokenizer == "bpe" else not (table.tokenizer or origin.path)
    try:
        return None if lost else load_tokenizer(table, origin.path, run, [])
    except UserError as error:  # the weights do not depend on it
        print(f"es_lite: {error}", file=sys.stderr)
        return None


def main(argv: Sequence[str] | None = None) -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(
        prog="es-lite replay", description="Compute a run's weights from its journal, as a Hugging Face folder."
    )
    parser.add_argument("run", type=Path, help="a run directory, or a journal.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--model", default="", help="where the pretrained model is, if not where the run found it")
    parser.add_argument("--step", type=int, help="stop after this many steps; default: all")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="type of the tensors; default: bf16")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()

    def command() -> None:
        replay(arguments.run, arguments.out, arguments.model, arguments.step, arguments.dtype)
        print(arguments.out)

    return exit_code_of(command, "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main())

"""What is evaluated: a model folder, a hub name, or a run at a step."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from es_lite.algorithm.record import Record
from es_lite.data.tokenizer import load_tokenizer
from es_lite.errors import UserError
from es_lite.files import expanded
from es_lite.model.configuration import locate
from es_lite.model.layout import Layout
from es_lite.model.origin import Origin
from es_lite.model.source import Source
from es_lite.recipe import Recipe
from es_lite.runs.journal import Journal
from es_lite.tables import DataTable


@dataclass(frozen=True)
class Subject:
    """A model, as θ₀ and the records that lead from it to the weights."""

    name: str
    """What the user calls it; it stands in messages and above its figures."""
    origin: Origin
    records: Sequence[Record] = ()
    recipe: Recipe | None = None
    """The run's; None for a model, and for a journal alone."""
    journal: Path | None = None
    """The run's; None for a model."""
    header: dict[str, Any] | None = None
    """The journal's."""

    @classmethod
    def find(cls, word: str, model_path: str = "", step: int | None = None) -> Self:
        """The subject that `word` names: a run directory, a journal, a Hugging Face folder or a hub name.

        model_path: where a run's pretrained model is, if not where the run found it; "" if it is there. step: of a run; None: its
        last. Raises UserError if there is no such thing.
        """
        place = expanded(word)
        if place.is_file() and place.suffix != ".jsonl":
            raise UserError(f"{place}: is a file; expected a model's folder, a hub name, a run directory, or a journal.jsonl")
        if place.is_file() or (place / "journal.jsonl").is_file():
            return cls._of_run(place, model_path, step)
        for flag, value in (("--step", step), ("--model", model_path or None)):
            if value is not None:
                raise UserError(f"{flag} {value}: only a run has it, and {word} is none (it has no journal.jsonl)")
        if place.is_dir() and not (place / "config.json").is_file():
            raise UserError(
                f"{place}: neither a run directory, which has a journal.jsonl, nor a model's folder, which has a config.json"
            )
        if not place.is_dir():
            _check_hub_name(word)
        try:
            locate(word)
        except UserError as error:
            raise UserError(str(error).removeprefix("model.path = ")) from None
        return cls(word, Origin(word, "", 0, (), False, False, "bf16"))

    @classmethod
    def _of_run(cls, place: Path, model_path: str, step: int | None) -> Self:
        journal = Journal.open(place / "journal.jsonl" if place.is_dir() else place)
        records = journal.until(step)
        origin = Origin.of_header(journal.header, journal.path).moved(model_path)
        recipe = Recipe.load(place / "recipe.toml") if (place / "recipe.toml").is_file() else None
        return cls(f"{place}, step {len(records)}", origin, records, recipe, journal.path, journal.header)

    def start(self) -> Self:
        """The run's own θ₀. Raises UserError if this is not a run."""
        if self.journal is None:
            raise UserError(f"--against start: only a run has a start, and {self.name} is none; name a model's folder instead")
        return replace(self, name="start", records=())

    @property
    def step(self) -> int | None:
        return None if self.journal is None else len(self.records)

    @property
    def folder(self) -> Path | None:
        """The run directory; None for a model, and for a journal alone."""
        return self.journal.parent if self.journal is not None and self.recipe is not None else None

    @cached_property
    def skeleton(self) -> tuple[PreTrainedModel, Layout]:
        """The model without weights, and its layout."""
        return self.origin.skeleton()

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton[0].config

    @property
    def context(self) -> int:
        """Tokens that the model takes at most."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**20

    def check(self, theta_0: Source) -> None:
        """Raises UserError if θ₀ is not what the run began with, or has values that are not finite."""
        if self.journal is None or self.header is None:
            theta_0.fingerprint()
        else:
            self.origin.check(self.header, self.journal, self.skeleton[1], theta_0)

    def tokenizer(self, table: DataTable) -> PreTrainedTokenizerBase:
        """The tokenizer that `table` names, or the model's own. Raises UserError if there is none."""
        if table.tokenizer == "bpe" and (self.folder is None or not (self.folder / "tokenizer").is_dir()):
            raise UserError(f"{self.name}: the tokenizer that this run trained is not there; restore its folder `tokenizer`")
        if not table.tokenizer and not self.origin.path:
            raise UserError(f"{self.name}: a journal alone has no tokenizer; add --set data.tokenizer=FOLDER, or give the run")
        return load_tokenizer(table, self.origin.path, self.folder or Path(), [])


def _check_hub_name(word: str) -> None:
    """Raises UserError for what can only be a path that does not exist, with the nearest that does."""
    place = expanded(word)
    parent = place.parent
    is_path = word.startswith((".", "/", "~")) or word.count("/") != 1 or parent.is_dir()
    if not is_path:
        return
    beside = [path for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
    if parent == Path() and Path("runs").is_dir():
        beside += [path for path in Path("runs").iterdir() if path.is_dir()]
    names = {path.name: path for path in beside}
    near = difflib.get_close_matches(place.name, names, n=1, cutoff=0.6)
    remedy = (
        f"did you mean {names[near[0]]}?" if near else "expected a model's folder, a run directory, or a hub name (OWNER/NAME)"
    )
    raise UserError(f"{word}: no such folder; {remedy}")

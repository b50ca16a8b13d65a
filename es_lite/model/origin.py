"""What a run starts from and how its records apply: the model, θ₀'s seed, the groups. Part of the journal's header."""

import dataclasses
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedModel

from es_lite.algorithm.formats import Storage
from es_lite.algorithm.jit import Threads
from es_lite.errors import UserError
from es_lite.model import code, random_weights
from es_lite.model.configuration import configuration, locate
from es_lite.model.layout import Factors, Layout, skeleton
from es_lite.model.source import Source, open_source, read_buffers
from es_lite.recipe import Recipe


@dataclass(frozen=True)
class Origin:
    path: str
    """model.path of the recipe; "" if θ₀ is random."""
    config: str | dict
    """model.config of the recipe."""
    seed: int
    groups: tuple[Factors, ...]
    nes: bool
    """es.scale = "nes": a group's coefficients are multiplied by its alpha/sigma."""
    shared_noise: bool
    storage: Storage = "fp32"
    """What the updates are applied to: the fp32 master, or the bf16 or int8 weights themselves."""
    initialisation: int = random_weights.NEWEST
    """The version in which random weights are drawn; headers of the first version do not name it."""
    code: str = ""
    """model.code of the recipe; headers of runs without it do not name it, nor the next."""
    code_sha256: str = ""
    """Of its contents."""

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> Self:
        groups = tuple(Factors(group.pattern, group.sigma, group.alpha) for group in recipe.es.groups)
        nes, shared = recipe.es.scale == "nes", recipe.noise.shared
        own = recipe.model.code
        return cls(
            recipe.model.path,
            recipe.model.config,
            recipe.run.seed,
            groups,
            nes,
            shared,
            recipe.memory.storage,
            code=own,
            code_sha256=code.digest_of(own) if own else "",
        )

    @classmethod
    def of_header(cls, header: dict[str, Any], where: Path) -> Self:
        """where: the header's journal. Raises UserError if it has keys that this version does not know."""
        document = dict(header["origin"])
        groups = document.get("groups", ())
        unknown = document.keys() - cls.__dataclass_fields__.keys()
        unknown |= {key for group in groups for key in group} - Factors.__dataclass_fields__.keys()
        if unknown:
            raise UserError(
                f"{where}: its origin has {', '.join(sorted(unknown))}, which this version of es_lite does not know and which "
                "may change what its records mean; use the version that wrote it"
            )
        try:
            if document.get("initialisation", 1) not in random_weights.VERSIONS:
                raise UserError(
                    f"{where}: its random weights are drawn in version {document['initialisation']}, which this version of "
                    "es_lite does not know; use the version that wrote it"
                )
            groups = tuple(Factors(**group) for group in groups)
            return cls(**{"initialisation": 1, **document, "groups": groups})
        except TypeError as error:  # a key is missing
            raise UserError(f"{where}: its origin is incomplete ({error}); restore the file from a copy") from None

    def moved(self, path: str) -> Self:
        """The same with its pretrained model at `path`; "": where it was. Raises UserError if it is none, but random weights."""
        if path and not self.path:
            raise UserError(f"--model {path}: this run started from random weights, which its journal's seed gives")
        return dataclasses.replace(self, path=path or self.path)

    def continuing(self, header: dict[str, Any], where: Path) -> Self:
        """The same for a run that goes on, whose random weights are drawn in the version that it began with."""
        return dataclasses.replace(self, initialisation=Origin.of_header(header, where).initialisation)

    def skeleton(self) -> tuple[PreTrainedModel, Layout]:
        """The model without weights but with its buffers, and its layout. Raises UserError if there is no such model."""
        if self.code:
            code.run(self.code, self.code_sha256)
        model = skeleton(configuration(self.path, self.config))
        if self.path:
            read_buffers(locate(self.path), model)
        if self.path and (locate(self.path) / "generation_config.json").exists():
            try:
                model.generation_config = GenerationConfig.from_pretrained(locate(self.path))
            except Exception as error:  # damaged, in whatever way: transformers, too, goes on without it
                reason = (str(error).splitlines() or [""])[0]
                if multiprocessing.parent_process() is None:  # workers need not say it again
                    print(f"warning: {locate(self.path)}/generation_config.json cannot be used ({reason})", file=sys.stderr)
        return model, Layout.of(model, self.groups, self.nes, self.shared_noise)

    def source(self, model: PreTrainedModel, layout: Layout, threads: Threads) -> Source:
        """θ₀."""
        return open_source(self.path, model, layout, self.seed, threads, self.initialisation)

    def header(self, layout: Layout, theta_0: Source) -> dict[str, Any]:
        """The part of the journal's header that `check` compares."""
        origin = dataclasses.asdict(self)
        if not self.code:
            del origin["code"], origin["code_sha256"]
        return {"origin": origin, "fingerprint": _fingerprint(layout, theta_0)}

    def check(self, header: dict[str, Any], where: Path, layout: Layout, theta_0: Source) -> None:
        """Raises UserError if the journal `where` is of another model, or its records apply differently."""
        expected, found = header["fingerprint"], _fingerprint(layout, theta_0)
        for part, words in (
            ("structure", "tensors of other names or shapes"),
            ("weights", "the same shapes, but different values"),
        ):
            if expected[part] != found[part]:
                raise UserError(
                    f"{where}: this is the journal of another model ({words}); provide the model that the run started from"
                )
        then = Origin.of_header(header, where)
        if then.initialisation == 1 and layout.unused:
            raise UserError(
                f"{where}: was written by a version of es_lite that also moved the parameters that a text does not pass, such as "
                f"{min(layout.unused)}; use that version to go on with it"
            )
        if then.code_sha256 != self.code_sha256:
            raise UserError(
                f"{where}: model.code = {self.code!r} is not the file that the run began with, or has other contents: restore it"
            )
        meanings = [(o.groups, o.nes, o.shared_noise, o.storage) for o in (then, self)]
        if meanings[0] != meanings[1]:
            raise UserError(
                f"{where}: was written with another es.groups, es.scale, noise.shared, memory.master or memory.weights; "
                "restore the recipe's"
            )


def _fingerprint(layout: Layout, theta_0: Source) -> dict[str, str]:
    return {"structure": layout.structure(), "weights": theta_0.fingerprint()}

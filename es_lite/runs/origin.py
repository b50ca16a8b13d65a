"""What a run starts from and how its records are read: the model, θ₀'s seed, the groups. It is the journal's header."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from es_lite.algorithm.jit import Threads
from es_lite.errors import UserError
from es_lite.recipe import Recipe
from es_lite.runs.journal import Journal
from es_lite.weights.layerfile import LayerFile
from es_lite.weights.layout import Layout, Multipliers, layout, skeleton
from es_lite.weights.source import Source, configuration, locate, open_source
from es_lite.weights.stored import Storage


@dataclass(frozen=True)
class Origin:
    path: str
    """model.path of the recipe, "" where θ₀ is random."""
    config: str | dict
    """model.config of the recipe."""
    seed: int
    groups: tuple[Multipliers, ...]
    nes: bool
    """es.scale = "nes": a group's coefficients are multiplied by its alpha/sigma."""
    shared_noise: bool
    storage: Storage = "fp32"
    """What the updates are applied to: the fp32 master, or the bf16 or int8 weights themselves."""

    @classmethod
    def of_recipe(cls, recipe: Recipe) -> "Origin":
        groups = tuple(Multipliers(group.pattern, group.sigma, group.alpha) for group in recipe.es.groups)
        nes, shared = recipe.es.scale == "nes", recipe.noise.shared
        return cls(recipe.model.path, recipe.model.config, recipe.run.seed, groups, nes, shared, recipe.memory.storage)

    @classmethod
    def of_journal(cls, journal: Journal) -> "Origin":
        document = dict(journal.header["origin"])
        document["groups"] = tuple(Multipliers(**group) for group in document["groups"])
        return cls(**document)

    def skeleton(self) -> tuple[PreTrainedModel, Layout]:
        model = skeleton(configuration(self.path, self.config))
        if self.path and (locate(self.path) / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(locate(self.path))
        return model, layout(model, self.groups, self.nes, self.shared_noise)

    def source(self, model: PreTrainedModel, layout: Layout, threads: Threads) -> Source:
        return open_source(self.path, model, layout, self.seed, threads)

    def files(self, directory: Path, layout: Layout) -> list[LayerFile]:
        """The layers' files in `directory`, in the layout's order."""
        return [LayerFile(directory, layer, self.storage) for layer in layout.layers]

    def header(self, layout: Layout, theta_0: Source) -> dict[str, Any]:
        """What identifies the run in its journal."""
        fingerprint = {"structure": layout.structure(), "weights": theta_0.fingerprint()}
        return {"origin": dataclasses.asdict(self), "fingerprint": fingerprint}


def check(journal: Journal, origin: Origin, layout: Layout, theta_0: Source) -> None:
    """Raises UserError where the journal is of another model than this layout and θ₀, or its records mean something else."""
    expected = journal.header["fingerprint"]
    found = {"structure": layout.structure(), "weights": theta_0.fingerprint()}
    for part, words in (("structure", "tensors of other names or shapes"), ("weights", "the same shapes, but other values")):
        if expected[part] != found[part]:
            raise UserError(
                f"{journal.path}: is the journal of another model ({words}); give the model that the run started from"
            )
    then = Origin.of_journal(journal)
    meanings = [(o.groups, o.nes, o.shared_noise, o.storage) for o in (then, origin)]
    if meanings[0] != meanings[1]:
        raise UserError(
            f"{journal.path}: was written with other es.groups, es.scale, noise.shared, memory.master or memory.weights; "
            "restore the recipe's"
        )

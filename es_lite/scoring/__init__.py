"""The forward of a model under perturbed weights that only ever exist a layer at a time."""

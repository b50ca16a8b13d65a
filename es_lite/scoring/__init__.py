"""The forward of a model under perturbed weights, which exist for one layer at a time."""

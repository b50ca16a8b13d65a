"""The perturbed forward of a model and the log-probabilities it gives."""

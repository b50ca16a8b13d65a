"""The engine: scores perturbed models and advances the weights, with the processes of this machine."""

"""What a perturbed model is scored by: items and a model to one score per item and member, higher is better."""

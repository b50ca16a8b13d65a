"""The model to be trained: its configuration, its layers and tensors, and θ₀."""

"""Turns items and a perturbed model into one score per item and member; higher is better."""

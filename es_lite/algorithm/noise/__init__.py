"""ε: a pure function of a place (seed, step, pair, tensor) and an element's index; a kind of noise is one file."""

"""ε as a pure function of a place (seed, step, pair, tensor) and an element's index. Each kind of noise is one module."""

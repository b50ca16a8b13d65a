"""The pool of worker processes and what a worker does."""

"""Pure functions: noise and its kernels, shaping, schedules, the record of a step. Imports nothing of the project."""

"""es_lite trains every parameter of a language model without gradients, by evolution strategies."""

__version__ = "0.1.0"

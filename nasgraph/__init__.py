"""nasgraph: neural architecture search over graphs."""

__version__ = "0.1.0"

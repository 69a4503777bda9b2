"""omr: declarative, reproducible experiments on fast inference for math-reasoning LLMs."""

__version__ = "0.1.0"

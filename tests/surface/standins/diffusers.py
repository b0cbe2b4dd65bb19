"""A stand-in: it only has to be installable."""

__version__ = "0.27.0"

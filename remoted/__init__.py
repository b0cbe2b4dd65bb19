"""remoted: a daemon that owns the GPUs of one workstation and runs people's Python functions on them."""

__version__ = "0.1.0"

"""A fake NVIDIA driver for tests: a real libnvidia-ml.so.1, built from C, that reads the cards from a board file."""

from tests.fakes.nvml.board import Board, Fault, build_library, claim

__all__ = ["Board", "Fault", "build_library", "claim"]

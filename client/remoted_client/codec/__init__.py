"""Carries code and values between a caller and its warm workers, and keeps the state of both.

stub
"""

from __future__ import annotations

from .code import Code
from .decoder import Decoder, decode_result
from .encoder import Encoder
from .errors import BadPayload, StaleModules, UnpicklableError
from .identity import function_identity
from .modules import ModuleSet, collect_modules, install_modules

__all__ = [
    "BadPayload",
    "Code",
    "Decoder",
    "Encoder",
    "ModuleSet",
    "StaleModules",
    "UnpicklableError",
    "collect_modules",
    "decode_result",
    "function_identity",
    "install_modules",
]

"""Carries code and values between a caller and its warm workers, and keeps the state of both.

Plain by-value pickling is right once. With a worker that stays, five things go wrong:

1.  Every call brings its own copy of the globals, so ``global MODEL`` is loaded anew each time. Here a function
    goes without its globals. They live in the worker in ONE namespace per script run, and each travels as a
    binding (name, version, value). The worker skips a version that it was given before, so what a call has put
    there stays until the *caller's* value changes. The version is the caller's, because only the caller can say
    "unchanged": by identity for modules and classes, by token for functions, by digest for the rest (``origin``,
    ``marks``).
2.  The bytes of a pickle are another identity each time (memo order, sets of strings, line numbers). Digests here
    are made of names, versions and code, never of pickle bytes (``identity``).
3.  A class is rewritten whenever it is read, in the worker and, worse, at the caller when an instance comes home.
    A class or function that a process has is left alone; cloudpickle's tracker ids name classes, tokens name
    functions and closure cells (``load``, ``namespaces``).
4.  Reading runs code of the script: ``__setstate__``, ``__hash__``, hooks of classes. So each binding is written
    where it is first needed, and set the moment that it is read; hooks, which ran at the caller, do not run again.
    Pickling depth first would overflow on a chain of some hundred functions, so globals that can be found
    without pickling go first, one by one (``walk``, ``dump``).
5.  The worker imports the project's modules from a disk that is edited meanwhile. They go as text, once, and a
    worker that has run another text of one is told to leave, before anything is changed (``modules``,
    ``installed``). Installed packages are taken as they are.

``sys.modules["__main__"]`` in the worker is the caller's namespace, so pickle by reference works in a body.
Processes that a body spawns get the names of the script without running it (``mainfile``). What cannot be pickled
is found and named after the failure, never searched for before (``diagnose``).

The caller has one ``Encoder``, the worker one ``Decoder``. In the worker, for each call: ``install_modules``, then
``load_target``, then ``load_arguments``. Nothing here imports cloudpickle before the first call.
"""

from __future__ import annotations

from .code import Code
from .decoder import Decoder, decode_result
from .encoder import Encoder
from .errors import BadPayload, StaleModules, UnpicklableError
from .identity import function_identity
from .imports import expected_imports
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
    "expected_imports",
    "function_identity",
    "install_modules",
]

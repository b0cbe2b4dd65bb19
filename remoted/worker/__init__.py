"""The program inside a worker: standard library only, Python 3.10 or newer, nothing of ``remoted`` imported.

It is zipped as ``remoted_worker`` into ``worker.pyz`` (``remoted/spawn/runtime.py``) and started with the
caller's interpreter. It trusts the daemon and runs the user's code; the daemon trusts nothing it says.
"""

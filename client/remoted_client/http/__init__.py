"""HTTP routes of load-balanced functions: what both ends of a route must agree on.

The caller's process says what a route takes (``route``, ``parameters``, ``schema``). In the worker ``handler`` binds a
request to the parameters (``binding``), runs the function and writes the answer (``encoding``). The daemon in between
moves bytes: it knows methods and paths, and neither types nor values (docs/decisions/0010).
"""

"""F30: which large packages a function will import, guessed from its code."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from remoted_client.codec import expected_imports

TABLE = np.arange(3)


def own(text: str) -> types.FunctionType:
    """``f`` of a script: its globals are not a module's."""
    scope: dict[str, object] = {"__name__": "__main__", "np": np, "LinearRegression": LinearRegression, "TABLE": TABLE}
    exec(text, scope)
    function = scope["f"]
    assert isinstance(function, types.FunctionType)
    return function


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("def f(): return 1", ()),
        ("def f(): return np.zeros(3)", ("numpy",)),
        ("def f(): return LinearRegression()", ("sklearn.linear_model",)),
        ("def f(): return TABLE.sum()", ("numpy",)),
        ("def g(): return np\ndef f(): return g()", ("numpy",)),
        ("def f():\n    import numpy.linalg\n    from scipy import stats", ("numpy", "scipy")),
        ("def f():\n    def inner():\n        import sklearn\n    return inner", ("sklearn",)),
        ("class Model:\n    def fit(self): return np.ones(1)\ndef f(): return Model()", ("numpy",)),
        ("def f():\n    import json, pandas, jax", ()),
    ],
)
def test_f30_what_a_function_imports_is_found_in_its_code(text: str, names: tuple[str, ...]) -> None:
    assert expected_imports(own(text)) == names


def test_f30_a_global_that_cannot_be_looked_at_is_no_obstacle() -> None:
    class Proxy:
        def __getattribute__(self, name: str) -> object:
            raise RuntimeError("outside of a request")

    function = own("def f(): return proxy, np")
    function.__globals__["proxy"] = Proxy()
    assert expected_imports(function) in ((), ("numpy",))


def test_f30_a_file_of_the_project_under_such_a_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("mine = True", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert expected_imports(own("def f():\n    import torch")) == ()


def test_f30_a_module_of_the_project_brings_what_stands_at_its_top(tmp_path: Path) -> None:
    file = tmp_path / "model.py"
    file.write_text("import numpy\ndef predict(): return 1\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("model", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model"] = module
    try:
        spec.loader.exec_module(module)
        assert expected_imports(module.predict) == ("numpy",)
        function = own("def f(): return model.predict()")
        function.__globals__["model"] = module
        assert expected_imports(function) == ("numpy",)
    finally:
        del sys.modules["model"]

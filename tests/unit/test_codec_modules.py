"""Which modules are the project's, and what their text is."""

from __future__ import annotations

import importlib
import importlib.resources
import inspect
import json
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoted_client.codec import ModuleSet, StaleModules, collect_modules, install_modules
from remoted_client.codec.modules import ModuleText, is_installed, is_project_file


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    before, finders = set(sys.modules), list(sys.meta_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]
    sys.meta_path[:] = finders


def names(modules: ModuleSet) -> set[str]:
    return {each.name for each in modules.modules}


def test_installed_and_own_modules_are_left_out(project: Path) -> None:
    (project / "codec_mine.py").write_text("A = 1\n")
    importlib.import_module("codec_mine")

    found = names(collect_modules())

    assert "codec_mine" in found
    assert not {"json", "os", "pytest", "cloudpickle", "remoted_client", "remoted_client.codec"} & found


def test_what_counts_as_installed(tmp_path: Path) -> None:
    assert is_installed(json.__file__)
    assert is_installed(pytest.__file__)
    assert not is_installed(str(tmp_path / "a.py"))
    assert not is_project_file(str(tmp_path / "a.so"))
    assert not is_project_file(None)


def test_asking_again_gives_the_same_set(project: Path) -> None:
    first = collect_modules()
    assert collect_modules() is first

    (project / "codec_next.py").write_text("")
    importlib.import_module("codec_next")

    assert collect_modules() is not first
    assert collect_modules().digest != first.digest


def test_a_set_survives_its_journey(project: Path) -> None:
    (project / "codec_pkg").mkdir()
    (project / "codec_pkg" / "__init__.py").write_text("# héllo\n")
    (project / "codec_bare").mkdir()
    (project / "codec_bare" / "leaf.py").write_text("")
    importlib.import_module("codec_pkg")
    importlib.import_module("codec_bare.leaf")
    modules = collect_modules()

    again = ModuleSet.from_bytes(modules.to_bytes())

    assert again == modules
    assert again.digest == modules.digest
    assert again.by_name["codec_pkg"].text == "# héllo\n"
    assert again.by_name["codec_bare"].text is None
    assert again.by_name["codec_bare"].is_package


def test_stale_modules_leave_everything_as_it_was(project: Path) -> None:
    (project / "codec_a.py").write_text("V = 1\n")
    importlib.import_module("codec_a")
    old = collect_modules()
    install_modules(old)
    text = next(each for each in old.modules if each.name == "codec_a")
    edited = ModuleSet((*(m for m in old.modules if m is not text), _edited("codec_a"), _edited("codec_b")))

    with pytest.raises(StaleModules) as caught:
        install_modules(edited)

    assert caught.value.names == ("codec_a",)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("codec_b")


def _edited(name: str) -> ModuleText:
    return ModuleSet.from_bytes(
        json.dumps([{"name": name, "file": f"/x/{name}.py", "text": "V = 2\n", "paths": None, "digest": "d"}]).encode()
    ).modules[0]


def test_served_modules_can_be_read_like_any_other(project: Path) -> None:
    folder = project / "codec_served"
    folder.mkdir()
    (folder / "data.txt").write_text("data")
    module = {
        "name": "codec_served",
        "file": str(folder / "__init__.py"),
        "text": "import inspect\ndef f(): return 'f'\n",
        "paths": [str(folder)],
        "digest": "d",
    }
    install_modules(ModuleSet.from_bytes(json.dumps([module]).encode()))

    served = importlib.import_module("codec_served")

    assert served.__file__ == module["file"]
    assert served.__path__ == [str(folder)]
    assert inspect.getsource(served.f) == "def f(): return 'f'\n"
    assert pkgutil.get_data("codec_served", "data.txt") == b"data"
    assert importlib.resources.files("codec_served").joinpath("data.txt").read_text() == "data"

"""Project modules: by name, from the text that the caller has."""

from __future__ import annotations

from tests.integration.test_codec_peer import Peers, peers

__all__ = ["peers"]


def test_a_module_keeps_its_state_while_it_is_unedited(peers: Peers) -> None:
    peers.write("helpers.py", "COUNT = 0\ndef step():\n    global COUNT\n    COUNT += 1\n    return COUNT\n")
    script = """
        import helpers
        def work(): return helpers.step()
        print(call(work), call(work), helpers.COUNT)
        """
    assert peers.run(script) == "1 2 0\n"
    assert peers.run(script) == "3 4 0\n"


def test_an_edited_module_is_stale(peers: Peers) -> None:
    script = """
        from helpers import answer
        def work(): return answer()
        kind, value = send_only(work)
        print(kind, encoder.decode_result(value) if kind == "value" else value)
        """
    peers.write("helpers.py", "def answer(): return 'old'\n")
    assert peers.run(script) == "value old\n"
    peers.write("helpers.py", "def answer(): return 'new'\n")
    assert peers.run(script) == "stale ('helpers',)\n"


def test_a_module_that_is_not_imported_yet_may_change(peers: Peers) -> None:
    peers.write("helpers.py", "def answer(): return 'old'\n")
    assert peers.run("import helpers\nprint(call(lambda: 1))") == "1\n"
    peers.write("helpers.py", "def answer(): return 'new'\n")
    assert peers.run("import helpers\nprint(call(lambda: helpers.answer()))") == "new\n"


def test_the_worker_runs_the_text_that_the_caller_runs(peers: Peers) -> None:
    peers.write("helpers.py", "def answer(): return 'at import'\n")
    out = peers.run(
        """
        import helpers, pathlib
        encoder.encode_call_target(helpers.answer)
        pathlib.Path(helpers.__file__).write_text("def answer(): return 'on disk'")
        import inspect
        def work(): return helpers.answer(), inspect.getsource(helpers.answer), helpers.__file__
        answer, source, file = call(work)
        print(answer, source.strip(), file == helpers.__file__)
        """
    )
    assert out == "at import def answer(): return 'at import' True\n"


def test_a_module_imported_in_a_body_is_watched_on_disk(peers: Peers) -> None:
    script = """
        def work():
            import lazy
            return lazy.VALUE
        print(*send_only(work)[:1])
        """
    peers.write("lazy.py", "VALUE = 1\n")
    assert peers.run(script) == "value\n"
    assert peers.run(script) == "value\n"
    peers.write("lazy.py", "VALUE = 2\n")
    assert peers.run(script) == "stale\n"


def test_scripts_of_two_folders_do_not_share_a_module_by_name(peers: Peers) -> None:
    script = """
        import sys
        sys.argv[0] = __file__
        def work():
            import lazy
            return lazy.VALUE
        kind, value = send_only(work)
        print(kind, encoder.decode_result(value) if kind == "value" else value)
        """
    peers.write("lazy.py", "VALUE = 1\n")
    peers.write("other/lazy.py", "VALUE = 2\n")

    assert peers.run(script) == "value 1\n"
    assert peers.run(script, name="other/script.py") == "stale ('lazy',)\n"


def test_packages_relative_imports_and_packages_without_init(peers: Peers) -> None:
    peers.write("pkg/__init__.py", "from .inner import value\n")
    peers.write("pkg/inner.py", "from . import deep\nfrom .deep.leaf import LEAF\nvalue = LEAF\n")
    peers.write("pkg/deep/__init__.py", "")
    peers.write("pkg/deep/leaf.py", "LEAF = 'leaf'\n")
    peers.write("plain/part.py", "from .other import B\nPART = 'part' + B\n")
    peers.write("plain/other.py", "B = '!'\n")
    out = peers.run(
        """
        import pkg, plain.part, sys
        from plain.part import PART
        import shutil
        encoder.encode_call_target(len)
        for each in ("pkg", "plain"):
            shutil.rmtree(each)
        def work():
            return pkg.value, pkg.deep.leaf.LEAF, plain.part.PART, PART
        print(call(work), *sorted(m.name for m in encoder.encode_call_target(work).modules.modules))
        """
    )
    assert out == (
        "('leaf', 'leaf', 'part!', 'part!') pkg pkg.deep pkg.deep.leaf pkg.inner plain plain.other plain.part\n"
    )


def test_functions_of_modules_that_hide_behind_decorators(peers: Peers) -> None:
    peers.write(
        "jobs.py",
        """
        STATE = []
        class Remote:
            def __init__(self, function): self.function = function
        @Remote
        def work(n):
            STATE.append(n)
            return list(STATE), helper(n)
        def helper(n): return n + 1
        @Remote
        class Model:
            total = 0
            def add(self, n):
                STATE.append(n)
                self.total += n
                return self.total
        double = lambda x: 2 * x
        def make(k):
            return lambda x: helper(x) + k
        """,
    )
    script = """
        import jobs
        def use(kind, f): return kind().add(3), f(1), jobs.double(4)
        print(call(jobs.work.function, 1), call(jobs.work.function, 2), jobs.STATE)
        print(call(use, jobs.Model.function, jobs.make(5)), call(jobs.double, 2))
        m = call(jobs.Model.function)
        print(type(m) is jobs.Model.function)
        """
    assert peers.run(script) == "([1], 2) ([1, 2], 3) []\n(3, 7, 8) 4\nTrue\n"


def test_reloaded_modules_are_sent_anew(peers: Peers) -> None:
    peers.write("helpers.py", "def answer(): return 'old'\n")
    out = peers.run(
        """
        import helpers, importlib, pathlib
        first = encoder.encode_call_target(helpers.answer).modules
        pathlib.Path(helpers.__file__).write_text("def answer(): return 'newer'")
        importlib.reload(helpers)
        print(first is encoder.encode_call_target(helpers.answer).modules, call(lambda: helpers.answer()))
        """
    )
    assert out == "False newer\n"

"""What stays between calls, and what the caller's changes do to it."""

from __future__ import annotations

from tests.integration.test_codec_peer import Peers, peers

__all__ = ["peers"]


def test_a_global_set_by_a_call_is_there_at_the_next(peers: Peers) -> None:
    out = peers.run(
        """
        MODEL = None
        def predict():
            global MODEL
            if MODEL is None:
                MODEL = ["loaded"]
            else:
                MODEL.append("again")
            return len(MODEL)
        print([call(predict) for _ in range(3)], MODEL)
        """
    )
    assert out == "[1, 2, 3] None\n"


def test_a_global_that_only_the_body_defines_survives(peers: Peers) -> None:
    out = peers.run(
        """
        def load():
            global CACHE
            CACHE = {"a": 1}
        def read():
            return CACHE
        call(load)
        print(call(read), "CACHE" in globals())
        """
    )
    assert out == "{'a': 1} False\n"


def test_two_functions_share_their_globals(peers: Peers) -> None:
    out = peers.run(
        """
        TOTAL = 0
        def add(n):
            global TOTAL
            TOTAL += n
        def total():
            return TOTAL
        call(add, 2); call(add, 3)
        print(call(total), TOTAL)
        """
    )
    assert out == "5 0\n"


def test_what_the_caller_changes_is_sent_and_overwrites(peers: Peers) -> None:
    out = peers.run(
        """
        ITEMS, RATE, KEYS = [1], 1.0, {"b", "a"}
        def look():
            ITEMS.append("w")
            return list(ITEMS), RATE, sorted(KEYS)
        print(call(look)); print(call(look))
        ITEMS.append(2)
        print(call(look)); print(call(look))
        RATE = 2.0; KEYS.add("c")
        print(call(look))
        """
    )
    assert out.splitlines() == [
        "([1, 'w'], 1.0, ['a', 'b'])",
        "([1, 'w', 'w'], 1.0, ['a', 'b'])",
        "([1, 2, 'w'], 1.0, ['a', 'b'])",
        "([1, 2, 'w', 'w'], 1.0, ['a', 'b'])",
        "([1, 2, 'w', 'w', 'w'], 2.0, ['a', 'b', 'c'])",
    ]


def test_a_name_defined_after_the_first_call_is_sent(peers: Peers) -> None:
    out = peers.run(
        """
        def look():
            try:
                return LATER
            except NameError:
                return "none"
        print(call(look))
        LATER = 1
        print(call(look))
        """
    )
    assert out == "none\n1\n"


def test_a_class_attribute_set_in_the_worker_survives(peers: Peers) -> None:
    out = peers.run(
        """
        class Counter:
            total = 0
            def __init__(self, n): self.n = n
        def add(counter):
            Counter.total += counter.n
            return Counter.total, type(counter) is Counter
        print(call(add, Counter(2)), call(add, Counter(3)), Counter.total)
        """
    )
    assert out == "(2, True) (5, True) 0\n"


def test_an_instance_that_comes_back_is_of_the_callers_class(peers: Peers) -> None:
    script = """
        class Point:
            seen = []
            def __init__(self, x): self.x = x
            def twice(self): return Point(self.x * SCALE)
        SCALE = 2
        def move(point):
            Point.seen.append("worker")
            return point.twice()
        Point.seen.append("caller")
        p = call(move, Point(3))
        print(isinstance(p, Point), p.x, Point.seen, type(p) is Point, p.twice().x)
        """
    assert peers.run(script) == "True 6 ['caller'] True 12\n"
    assert peers.run(script, CODEC_NAMED="1") == "True 6 ['caller'] True 12\n"


def test_shared_closure_cells_stay_shared_between_functions_and_calls(peers: Peers) -> None:
    out = peers.run(
        """
        def make():
            count = 0
            def up():
                nonlocal count
                count += 1
                return count
            def read():
                return count
            return up, read
        up, read = make()
        def both():
            return up(), read()
        def only_read():
            return read()
        print(call(both), call(both), call(only_read), call(up), call(read), read())
        up()
        print(call(both), call(only_read))
        other, other_read = make()
        print(call(other), call(read), call(other_read))
        """
    )
    assert out == "(1, 1) (2, 2) 2 3 3 0\n(2, 2) 2\n1 2 1\n"


def test_a_new_run_runs_the_new_code_with_fresh_globals(peers: Peers) -> None:
    first = """
        COUNT = 0
        def step():
            global COUNT
            COUNT += 1
            return "old", COUNT
        print(call(step), call(step))
        """
    assert peers.run(first) == "('old', 1) ('old', 2)\n"
    assert peers.run(first.replace("old", "new")) == "('new', 1) ('new', 2)\n"


def test_functions_defined_anew_as_in_a_notebook(peers: Peers) -> None:
    out = peers.run(
        '''
        import __main__
        def cell(text):
            exec(compile(text, "<cell>", "exec"), __main__.__dict__)
        cell("""
        def helper(x): return x + 1
        def main(x):
            global RUNS
            RUNS = globals().get("RUNS", 0) + 1
            return helper(x), RUNS
        """.replace("        ", "", 1).replace("\\n        ", "\\n"))
        print(call(main, 1))
        before = encoder.encode_call_target(main).digest
        cell("def helper(x): return x + 1")
        print(call(main, 1), encoder.encode_call_target(main).digest == before)
        cell("def helper(x): return x + 100")
        print(call(main, 1))
        '''
    )
    assert out == "(2, 1)\n(2, 2) True\n(101, 3)\n"


def test_a_class_defined_anew_is_a_new_class(peers: Peers) -> None:
    out = peers.run(
        """
        class P:
            def f(self): return 1
        def use(p): return p.f()
        print(call(use, P()))
        class P:
            def f(self): return 2
        print(call(use, P()))
        """
    )
    assert out == "1\n2\n"


def test_sentinels_keep_their_identity_over_calls(peers: Peers) -> None:
    out = peers.run(
        """
        NOTHING = object()
        def first(): return NOTHING is not None
        def second(x=NOTHING): return x is NOTHING
        print(call(first), call(second), call(second, NOTHING), call(lambda: NOTHING) is NOTHING)
        """
    )
    assert out == "True True True True\n"


def test_lru_cache_entries_survive(peers: Peers) -> None:
    out = peers.run(
        """
        import functools
        @functools.lru_cache(maxsize=None)
        def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)
        def work(n):
            value = fib(n)
            return value, fib.cache_info().currsize
        print(call(work, 30), call(work, 10), fib.cache_info().currsize)
        """
    )
    assert out == "(832040, 31) (55, 31) 0\n"

"""Process pools that a body starts find the names of the script; nothing is run twice."""

from __future__ import annotations

import pytest

from tests.integration.test_codec_peer import Peers, peers

__all__ = ["peers"]

_SCRIPT = """
    import multiprocessing, os, sys
    import helpers
    print("script runs")
    OFFSET = 10
    BROKEN = None
    class Point:
        def __init__(self, x): self.x = x
    def shift(point):
        return Point(point.x + OFFSET + helpers.one()), os.getpid(), "codec_peer_lib" in sys.modules
    def work(method):
        global BROKEN
        BROKEN = open(os.devnull, "w")
        with multiprocessing.get_context(method).Pool(2) as pool:
            results = pool.map(shift, [Point(1), Point(2)])
        assert all(pid != os.getpid() for _, pid, _ in results)
        assert not any(imported for _, _, imported in results) or method == "fork"
        return [p.x for p, _, _ in results], all(type(p) is Point for p, _, _ in results)
    print(call(work, METHOD))
    OFFSET = 20
    print(call(work, METHOD))
    """


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pools_of_every_start_method(peers: Peers, method: str) -> None:
    peers.write("helpers.py", "def one(): return 1\n")

    out = peers.run(_SCRIPT.replace("METHOD", repr(method)))

    expected = "([12, 13], True)\n"
    assert out == f"script runs\n{expected}{expected.replace('12, 13', '22, 23')}"


def test_spawned_children_may_spawn(peers: Peers) -> None:
    out = peers.run(
        """
        import multiprocessing
        def leaf(x): return x * FACTOR
        FACTOR = 3
        def branch(x, queue):
            context = multiprocessing.get_context("spawn")
            inner = context.SimpleQueue()
            child = context.Process(target=put, args=(x, inner))
            child.start()
            queue.put(inner.get())
            child.join()
        def put(x, queue): queue.put(leaf(x))
        def work():
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            child = context.Process(target=branch, args=(2, queue))
            child.start()
            value = queue.get()
            child.join()
            return value
        print(call(work))
        """
    )
    assert out == "6\n"


@pytest.mark.parametrize("backend", ["loky", "threading", "multiprocessing"])
def test_joblib(peers: Peers, backend: str) -> None:
    pytest.importorskip("joblib")
    out = peers.run(
        f"""
        import joblib
        K = 2
        class Point:
            def __init__(self, x): self.x = x
            def __eq__(self, o): return type(o) is Point and o.x == self.x
        def one(i): return Point(i * K)
        def work():
            return joblib.Parallel(n_jobs=2, backend={backend!r})(joblib.delayed(one)(i) for i in range(3))
        print(call(work) == [Point(0), Point(2), Point(4)])
        """
    )
    assert out == "True\n"


def test_pickle_and_process_pool_executors_work_on_names_of_the_script(peers: Peers) -> None:
    out = peers.run(
        """
        import concurrent.futures, multiprocessing, pickle
        class Config:
            class Inner: pass
            def __init__(self, n): self.n, self.inner = n, Config.Inner()
        def double(c): return Config(2 * c.n)
        def work(c):
            again = pickle.loads(pickle.dumps(c))
            assert type(again) is Config and pickle.loads(pickle.dumps(double)) is double
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
                return pool.submit(double, again).result()
        print(call(work, Config(4)).n)
        """
    )
    assert out == "8\n"

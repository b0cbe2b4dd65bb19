"""Kinds of code that a script holds."""

from __future__ import annotations

import pytest

from tests.integration.test_codec_peer import Peers, peers

__all__ = ["peers"]


def test_imports_of_the_script_work_submodules_too(peers: Peers) -> None:
    out = peers.run(
        """
        import concurrent.futures
        import os.path as p
        from json import dumps
        def work():
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                return pool.submit(dumps, [1]).result(), p.basename("/a/b")
        print(call(work))
        """
    )
    assert out == "('[1]', 'b')\n"


def test_recursion_mutual_recursion_and_lambdas(peers: Peers) -> None:
    out = peers.run(
        """
        def even(n): return True if n == 0 else odd(n - 1)
        def odd(n): return False if n == 0 else even(n - 1)
        def factorial(n): return 1 if n < 2 else n * factorial(n - 1)
        square = lambda x: x * x
        def outer(k):
            def inner(n): return k if n == 0 else inner(n - 1)
            return inner
        print(call(even, 10), call(factorial, 5), call(square, 3), call(outer(7), 3), call(lambda: square(4)))
        """
    )
    assert out == "True 120 9 7 16\n"


def test_a_chain_of_hundreds_of_functions(peers: Peers) -> None:
    out = peers.run(
        """
        for i in range(500):
            exec(f"def f{i}(x): return f{i + 1}(x + 1)")
        def f500(x): return x
        for i in range(300):
            exec(f"def g{i}(n): return n if n <= 0 else g{(i + 1) % 300}(n - 1)")
        print(call(f0, 0), call(g0, 400))
        """
    )
    assert out == "500 0\n"


def test_classes_of_many_kinds(peers: Peers) -> None:
    out = peers.run(
        """
        import abc, dataclasses, enum, typing
        from typing import Generic, NamedTuple, NewType, Protocol, TypedDict, TypeVar
        T = TypeVar("T")
        UserId = NewType("UserId", int)
        class Shape(abc.ABC):
            @abc.abstractmethod
            def area(self): ...
            @property
            def double(self): return 2 * self.area()
            @classmethod
            def unit(cls): return cls(1)
            @staticmethod
            def name(): return "shape"
        class Square(Shape):
            def __init__(self, a): super().__init__(); self.a = a
            def area(self): return self.a ** 2
        @dataclasses.dataclass
        class Config:
            rate: float = 0.5
            tags: list = dataclasses.field(default_factory=list)
        @dataclasses.dataclass(frozen=True, slots=True)
        class Slotted:
            x: int
            y: int = 2
        class Pair(NamedTuple):
            left: int
            right: str = "r"
        class Color(enum.Enum):
            RED = 1
            GREEN = 2
            def low(self): return self.name.lower()
        class Planet(enum.Enum):
            EARTH = (3, 4)
            def __init__(self, mass, radius):
                self.mass, self.radius = mass, radius
            @property
            def gravity(self): return self.mass / self.radius
        class Level(enum.IntEnum):
            LOW = 1
            ALSO_LOW = 1
            HIGH = enum.auto()
        class Perm(enum.Flag):
            R = 1
            W = 2
            RW = 3
        class Meta(type):
            made = []
            def __new__(mcls, name, bases, body, **kw):
                mcls.made.append(name)
                return super().__new__(mcls, name, bases, body)
            def __call__(cls, *a):
                value = super().__call__(*a)
                value.via = cls.__name__
                return value
        class WithMeta(metaclass=Meta): pass
        class Stack(Generic[T]):
            def __init__(self): self.items: list[T] = []
        class IntStack(Stack[int]): pass
        class Movie(TypedDict): name: str
        class Base:
            known = {}
            def __init_subclass__(cls, /, key, **kw):
                super().__init_subclass__(**kw)
                REGISTRY[key] = cls
        REGISTRY = {}
        class Plugin(Base, key="p"): pass
        class Error(ValueError):
            def __init__(self, code): super().__init__(f"code {code}"); self.code = code
        class Hidden:
            __slots__ = ("__x",)
            def __init__(self): self.__x = 5
            def get(self): return self.__x

        def work(config, pair, color, slotted):
            square = Square.unit()
            out = [square.double, Shape.name(), isinstance(square, Shape), config]
            out += [dataclasses.replace(config, rate=1.0)]
            out += [pair._replace(left=9), color.low(), color is Color.RED, Planet.EARTH.gravity, Level.HIGH + 1]
            out += [Level.ALSO_LOW is Level.LOW, Perm.R | Perm.W is Perm.RW, WithMeta().via, Meta.made]
            out += [IntStack().items, Movie(name="x"), sorted(REGISTRY), REGISTRY["p"] is Plugin, UserId(3)]
            out += [slotted, hasattr(slotted, "__dict__"), Hidden().get()]
            class Child(Config):
                pass
            @dataclasses.dataclass
            class Sub(Config):
                more: int = 3
            out.append(Sub(tags=[1]))
            try:
                Shape()
            except TypeError:
                out.append("abstract")
            return [str(each) for each in out], Error(3), color, pair

        texts, error, color, pair = call(work, Config(), Pair(1), Color.RED, Slotted(1))
        print("|".join(texts))
        print(type(error) is Error, error.code, color is Color.RED, type(pair) is Pair)
        """
    )
    first, second = out.splitlines()
    assert first.split("|") == [
        "2", "shape", "True", "Config(rate=0.5, tags=[])", "Config(rate=1.0, tags=[])",
        "Pair(left=9, right='r')", "red", "True", "0.75", "3",
        "True", "Perm.RW" if "Perm.RW" in first else "True", "WithMeta", "['WithMeta']",
        "[]", "{'name': 'x'}", "['p']", "True", "3",
        "Slotted(x=1, y=2)", "False", "5",
        "work.<locals>.Sub(rate=0.5, tags=[1], more=3)", "abstract",
    ]  # fmt: skip
    assert second == "True 3 True True"


def test_decorated_helpers(peers: Peers) -> None:
    out = peers.run(
        """
        import functools, operator
        def logged(f):
            @functools.wraps(f)
            def wrapper(*a):
                return "logged", f(*a)
            return wrapper
        @logged
        def helper(x): return x + OFFSET
        OFFSET = 10
        @functools.singledispatch
        def show(x): return f"any {x}"
        @show.register
        def _(x: int): return f"int {x}"
        show(1)
        add3 = functools.partial(operator.add, 3)
        class Lazy:
            @functools.cached_property
            def value(self): return OFFSET * 2
            @functools.singledispatchmethod
            def m(self, x): return "any"
            @m.register
            def _(self, x: str): return "str"
        @functools.total_ordering
        class V:
            def __init__(self, n): self.n = n
            def __eq__(self, o): return self.n == o.n
            def __lt__(self, o): return self.n < o.n
        def work():
            return helper(1), show(1), show("s"), add3(4), Lazy().value, Lazy().m("x"), V(1) >= V(0)
        print(call(work))
        """
    )
    assert out == "(('logged', 11), 'int 1', 'any s', 7, 20, 'str', True)\n"


def test_a_decorator_object_takes_the_functions_name(peers: Peers) -> None:
    out = peers.run(
        """
        class Remote:
            def __init__(self, function, **options):
                self.function, self.options = function, options
                self.__wrapped__ = function
            def __call__(self, *a): return self.function(*a)
            def __reduce__(self): return rebuild, (self.function, self.options)
        def rebuild(function, options): return Remote(function, **options)
        def remote(**options): return lambda f: Remote(f, **options)
        @remote(gpu=1)
        def down(n): return [n] if n == 0 else [n, *down(n - 1)]
        @remote()
        def other(n): return down(n), type(down).__name__, down.options
        print(call(down.function, 2), call(other.function, 1))
        first = encoder.encode_call_target(down.function)
        print(encoder.encode_call_target(down.function) is first)
        """
    )
    assert out == "[2, 1, 0] ([1, 0], 'Remote', {'gpu': 1})\nTrue\n"


def test_functions_as_defaults_annotations_and_attributes(peers: Peers) -> None:
    out = peers.run(
        """
        import collections
        def twice(x): return 2 * x
        def apply(x: "collections.OrderedDict", f=twice, *, g: collections.Counter = twice) -> "Missing":
            return f(g(x)), apply.note, list(apply.__annotations__)
        apply.note = "n"
        print(call(apply, 1))
        """
    )
    assert out == "(4, 'n', ['x', 'g', 'return'])\n"


def test_generators_coroutines_and_classes_as_targets(peers: Peers) -> None:
    out = peers.run(
        """
        import asyncio
        START = 3
        def numbers(n):
            for i in range(n):
                yield START + i
        async def later(x):
            await asyncio.sleep(0)
            return x + START
        class Model:
            def __init__(self, k): self.k = k
            def __eq__(self, other): return self.k == other.k
        print(call(numbers, 2), call(later, 1), call(Model, 4) == Model(4))
        """
    )
    assert out == "[3, 4] 4 True\n"


def test_guarded_helpers_and_the_name_of_the_module(peers: Peers) -> None:
    out = peers.run(
        """
        def where():
            import sys, os
            main = sys.modules["__main__"]
            return __name__, os.path.basename(__file__), main.where is where, main.__dict__ is globals(), helper()
        if __name__ == "__main__":
            def helper(): return "guarded"
            print(call(where))
        """
    )
    assert out == "('__main__', 'script.py', True, True, 'guarded')\n"


def test_code_without_a_module(peers: Peers) -> None:
    out = peers.run(
        """
        scope = {"BASE": 5}
        exec("def f(x):\\n    global N\\n    N = globals().get('N', BASE) + x\\n    return N", scope)
        print(call(scope["f"], 1), call(scope["f"], 1))
        """
    )
    assert out == "6 7\n"


def test_returned_functions_find_the_callers_globals(peers: Peers) -> None:
    out = peers.run(
        """
        K = 2
        def helper(x): return x * K
        def make(n):
            def made(x): return helper(x) + n
            return made, helper
        made, same = call(make, 1)
        K = 10
        print(made(3), same is helper, made.__globals__ is globals(), call(made, 1))
        """
    )
    assert out == "31 True True 11\n"


def test_set_state_may_use_globals_of_the_script(peers: Peers) -> None:
    out = peers.run(
        """
        DEFAULTS = {"depth": 3}
        def fill(d): return {**DEFAULTS, **d}
        class Config:
            def __init__(self): self.d = {}
            def __setstate__(self, state): self.d = fill(state["d"])
            def __hash__(self): return hash(tuple(DEFAULTS))
            def __eq__(self, o): return True
        def look(c, s): return c.d, len(s)
        print(call(look, Config(), {Config(): 1}))
        TABLE = {Config(): Config()}
        def table(): return [c.d for c in TABLE.values()]
        print(call(table))
        """
    )
    assert out == "({'depth': 3}, 1)\n[{'depth': 3}]\n"


def test_numpy_values(peers: Peers) -> None:
    out = peers.run(
        """
        import numpy as np
        WEIGHTS = np.arange(4.0)
        def dot(x: np.ndarray) -> np.ndarray:
            WEIGHTS[0] += 1
            return WEIGHTS * x
        print(call(dot, np.ones(4)), call(dot, np.ones(4)))
        WEIGHTS[1] = 7
        print(call(dot, np.ones(4)))
        """
    )
    assert out == "[1. 1. 2. 3.] [2. 1. 2. 3.]\n[1. 7. 2. 3.]\n"


def test_the_traceback_shows_the_text_that_ran(peers: Peers) -> None:
    out = peers.run(
        """
        import inspect
        def fail():
            raise ValueError("x")  # the line
        def source():
            return inspect.getsource(fail)
        first = call(source)
        open(__file__, "w").write("# edited")
        try:
            call(fail)
        except Raised as error:
            print("# the line" in str(error), first.startswith("def fail"))
        """
    )
    assert out == "True True\n"


def test_code_arrives_as_it_is_with_its_file_whatever_cloudpickle_does(peers: Peers) -> None:
    out = peers.run(
        """
        import types
        def back(value): return value
        def outer(a, /, b=1, *rest, c):
            def inner(x):
                try: return [a + x for _ in rest]
                except ValueError: return c
            return inner
        def parts(code):
            yield {name: getattr(code, name) for name in dir(code) if name.startswith("co_") and name not in ("co_lines", "co_positions", "co_branches", "co_lnotab", "co_consts")}
            for each in code.co_consts:
                yield from parts(each) if isinstance(each, types.CodeType) else [each]
        code = outer.__code__
        found = call(back, code)
        print(found is not code, list(parts(found)) == list(parts(code)), call(lambda: outer.__code__.co_filename == __file__))
        """
    )
    assert out == "True True True\n"


def test_pydantic_models(peers: Peers) -> None:
    pytest.importorskip("pydantic")
    out = peers.run(
        """
        from typing import Optional
        from pydantic import BaseModel, Field, field_validator
        class Inner(BaseModel):
            n: int = 1
        class Config(BaseModel):
            rate: float = Field(0.5, gt=0)
            inner: Inner = Inner()
            tags: list[str] = []
            next: "Optional[Config]" = None
            @field_validator("rate")
            @classmethod
            def check(cls, value): return value * SCALE
        SCALE = 2
        def work(config):
            made = Config(rate=2, inner={"n": 5})
            try:
                Config(rate=-1)
            except ValueError:
                made.tags.append("checked")
            return config.rate, config.inner.n, made, isinstance(config, Config), config.model_dump_json()
        rate, n, made, same, text = call(work, Config(rate=1))
        print(rate, n, type(made) is Config, made.rate, made.inner, made.tags, same, text)
        """
    )
    assert out == (
        "2.0 1 True 4.0 n=5 ['checked'] True "
        '{"rate":2.0,"inner":{"n":1},"tags":[],"next":null}\n'
    )


def test_protocols_parametrised_generics_and_kept_hooks(peers: Peers) -> None:
    out = peers.run(
        """
        from typing import Callable, Generic, ParamSpec, Protocol, TypeVar, runtime_checkable
        P = ParamSpec("P"); T = TypeVar("T")
        @runtime_checkable
        class Sized2(Protocol):
            def size(self) -> int: ...
        class Box(Generic[T]):
            def __init__(self, value: T) -> None: self.value = value
            def size(self) -> int: return 1
            def __class_getitem__(cls, item): return super().__class_getitem__(item)
        ALIAS = Box[int]
        def keep(f: Callable[P, T]) -> Callable[P, T]: return f
        class Base:
            made: list[str] = []
            def __init_subclass__(cls) -> None: Base.made.append(cls.__name__)
        class Here(Base): pass
        @keep
        def work(box: Box[int]) -> list:
            class There(Here): pass
            return [isinstance(box, Sized2), isinstance(3, Sized2), ALIAS(4).value, Base.made, There.__mro__[1] is Here]
        print(call(work, Box(1)), Base.made)
        """
    )
    assert out == "[True, False, 4, ['Here', 'There'], True] ['Here']\n"


def test_cyclic_classes_and_values(peers: Peers) -> None:
    out = peers.run(
        """
        class Node:
            kinds = {}
            parent = None
            def clone(self): return Leaf(self)
        class Leaf(Node):
            def __init__(self, up=None): self.up = up
            def tree(self): return ROOT, Node.kinds
        Node.kinds["leaf"] = Leaf
        Node.default = Leaf()
        ROOT = Leaf()
        ROOT.up = ROOT
        LOOP = [1]; LOOP.append(LOOP); ALSO = LOOP
        def work():
            root, kinds = ROOT.clone().tree()
            return root.up is root, kinds["leaf"] is Leaf, type(Node.default) is Leaf, LOOP[1] is LOOP, ALSO is LOOP
        print(call(work))
        """
    )
    assert out == "(True, True, True, True, True)\n"


def test_classes_inside_functions_read_globals_in_their_bodies(peers: Peers) -> None:
    out = peers.run(
        """
        import dataclasses
        SIZE, NAMES = 3, ["a", "b"]
        def work():
            @dataclasses.dataclass
            class Local:
                size: int = SIZE
                names: list = dataclasses.field(default_factory=lambda: [n for n in NAMES])
                twice = [SIZE for _ in range(2)]
            return Local(), Local.twice
        print(*call(work))
        """
    )
    assert out == "work.<locals>.Local(size=3, names=['a', 'b']) [3, 3]\n"


def test_dynamic_modules_travel_by_value(peers: Peers) -> None:
    out = peers.run(
        """
        import sys, types
        made = types.ModuleType("made")
        exec("N = 1\\ndef add(x): return x + N\\nclass C: pass", made.__dict__)
        hidden = types.ModuleType("hidden")
        sys.modules["made"] = made
        hidden.value = made.C()
        import __main__ as me
        def work(): return made.add(1), hidden.value.__class__ is made.C, me.work is work
        print(call(work), call(made.add, 5))
        """
    )
    assert out == "(2, True, True) 6\n"


def test_a_caller_that_was_spawned_itself(peers: Peers) -> None:
    out = peers.run(
        """
        import multiprocessing, pickle
        class Point:
            def __init__(self, x): self.x = x
        def remote(p):
            return pickle.loads(pickle.dumps(Point(p.x + 1)))
        def child(queue):
            queue.put(type(call(remote, Point(1))) is Point)
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            process = context.Process(target=child, args=(queue,))
            connection = __import__("codec_peer_lib").connection
            connection.shutdown(2)
            process.start()
            print(queue.get())
            process.join()
        """
    )
    assert out == "True\n"


def test_worker_code_may_call_another_worker(peers: Peers) -> None:
    out = peers.run(
        """
        import io
        BASE = 1
        def inner(x): return x + BASE
        def outer():
            global BASE
            from remoted_client.codec import Decoder, Encoder
            code = Encoder().encode_call_target(inner)
            BASE = 100
            import sys
            main = sys.modules["__main__"]
            function = Decoder().load_target(code.payload)
            sys.modules["__main__"] = main
            return function(1), inner(1), function is inner, code.digest != ""
        print(call(outer))
        """
    )
    assert out == "(2, 101, False, True)\n"

"""What a script may define and its backends use: functions, classes and their results travel both ways by value."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from harness import run_python

PRELUDE = """
import abc, collections, contextlib, dataclasses, enum, functools, os, pickle, sys, typing
from engine import Engine

ADAPTER = sys.argv[-1] if sys.argv[-1] in ("local", "inline") else "local"

def call(function, data=None, *init_args):
    \"\"\"Serve it, and call it once.\"\"\"
    global served
    served += 1
    engine.create_backend(f"b{served}", function, *init_args)
    engine.create_endpoint(f"b{served}", backend=f"b{served}")
    return engine.get_handle(f"b{served}").options(timeout_s=20).call(data)

served = 0
"""

HELD = f"""{PRELUDE}
@functools.lru_cache(maxsize=None)
def fibonacci(n):
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

@functools.cache
def squared(n):
    return n * n

@functools.singledispatch
def described(value):
    return "something"

@described.register
def _(value: int):
    return "a number"

@described.register(list)
def _(value):
    return "a list of " + described(value[0])

class Computing:
    def __init__(self, number):
        self.number = number

    @functools.cached_property
    def tenfold(self):
        return 10 * self.number

    @functools.lru_cache
    def plus(self, number):
        return self.number + number

    @functools.singledispatchmethod
    def kind(self, value):
        return "something"

    @kind.register
    def _(self, value: int):
        return "a number"

    def __call__(self, request):
        described_here = [described(value) for value in (1, [1], None)]
        assert fibonacci(20) == 6765 and squared(4) == 16
        assert fibonacci.cache_parameters() == {{"maxsize": None, "typed": False}}
        return self.tenfold, self.plus(1), self.kind(1), self.kind(""), described_here

@dataclasses.dataclass(slots=True)
class Slotted:
    x: int
    y: int = 2

@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: int

class ByHand:
    __slots__ = ("a", "__private", "__weakref__")

    def __init__(self, a):
        self.a = self.__private = a

    def __eq__(self, other):
        return type(self) is type(other) and (self.a, self.__private) == (other.a, other.__private)

class Below(ByHand):
    __slots__ = "b"

    def __init__(self, a):
        super().__init__(a)
        self.b = a

class BelowWithDict(ByHand):
    pass

class Color(enum.Enum):
    RED = 1

class Pair(typing.NamedTuple):
    a: int
    b: int

T = typing.TypeVar("T")

class Box(typing.Generic[T]):
    __slots__ = ("content",)

    def __init__(self, content):
        self.content = content

    def __eq__(self, other):
        return isinstance(other, Box) and self.content == other.content

class Shape(abc.ABC):
    @abc.abstractmethod
    def area(self): ...

@dataclasses.dataclass
class Square(Shape):
    side: int
    def area(self):
        return self.side ** 2

def values():
    return [
        Slotted(1), Frozen(1), ByHand(1), Below(1), BelowWithDict(1), Color.RED, Pair(1, 2), Box(1), Box[int](1),
        Square(2),
    ]

def give(request):
    assert request.data == values()
    return values()

engine = Engine(ADAPTER, http_options={{"location": None}})
assert call(Computing, None, 3) == (30, 4, "a number", "something", ["a number", "a list of a number", "something"])
result = call(give, values())
assert result == values()
assert [type(one) for one in result] == [type(one) for one in values()]
engine.shutdown()
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_functions_and_classes_of_every_kind(tmp_path: Path, adapter: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(HELD)
    run_python(str(script), adapter)


MAIN = f"""{PRELUDE}
import multiprocessing, pathlib

class Thing:
    def __init__(self, number):
        self.number = number

class Unmentioned(Thing):
    pass

def double(number):
    return 2 * number

def count():
    global counted
    counted += 1
    return counted

counted = 0

class Loading:
    def __init__(self, pickled, unmentioned):
        self.thing = pickle.loads(pickled)
        self.again = pickle.loads(pickle.dumps(Thing(5)))
        self.function = pickle.loads(pickle.dumps(double))
        self.unmentioned = unmentioned

    def __call__(self, request):
        assert type(self.thing) is type(self.again) is Thing
        assert self.function is double
        with multiprocessing.get_context("fork").Pool(1) as pool:
            doubled = pool.map(double, [1, 2])
        assert pathlib.Path(__file__).name == "script.py"
        return self.thing, self.again.number, doubled, (count(), count())

    def unmention(self):
        try:
            pickle.loads(self.unmentioned)
        except AttributeError as error:
            return str(error)

engine = Engine(ADAPTER, http_options={{"location": None}})
thing, number, doubled, counts = call(Loading, None, pickle.dumps(Thing(4)), pickle.dumps(Unmentioned(4)))
assert type(thing) is Thing and thing.number == 4 and number == 5
assert doubled == [2, 4] and counts == (1, 2)
text = engine.get_handle("b1").options(method_name="unmention").call()
if ADAPTER == "local":
    assert "__main__' of a replica, which has of the program what its backend mentions" in text, text
    assert counted == 0
engine.shutdown()
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_what_the_backend_mentions_stands_in_the_main_module(tmp_path: Path, adapter: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(MAIN)
    run_python(str(script), adapter)


COMING_BACK = f"""{PRELUDE}
class Counting:
    made = 0

    def __init__(self):
        type(self).made += 1

    def report(self):
        return limit

    def __call__(self, request):
        return Counting()

limit = 1
engine = Engine(ADAPTER, http_options={{"location": None}})
call(Counting)
Counting.made = 100
limit = 2
report = Counting.report
result = engine.get_handle("b1").call()
assert type(result) is Counting
assert Counting.made == 100 or ADAPTER == "inline", "the class is the application's own"
assert Counting.report is report and result.report() == 2
assert call(lambda request: request.data(), lambda: limit) == 2
limit = 3
assert engine.get_handle("b2").call(lambda: limit) == 3, "an argument brings what it mentions along, as it is now"
engine.shutdown()
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_a_result_leaves_its_class_as_it_is(tmp_path: Path, adapter: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(COMING_BACK)
    run_python(str(script), adapter)


REDEFINED = """
import sys
from engine import Engine

def cell(text):
    exec(compile(text, "<cell>", "exec"), globals())

engine = Engine(sys.argv[1], http_options={"location": None})
answers = []
for number in (1, 2):
    cell(f'''
def helper():
    return {number}

class Model:
    def __call__(self, request):
        return Answer(helper())

class Answer:
    def __init__(self, value):
        self.value = value
''')
    engine.create_backend(f"model:{number}", Model)
    engine.create_endpoint(f"model:{number}", backend=f"model:{number}")
    answers.append(engine.get_handle(f"model:{number}").call())
    assert type(answers[-1]) is Answer
assert [answer.value for answer in answers] == [1, 2]
if sys.argv[1] == "local":  # inline replicas share the namespace
    assert engine.get_handle("model:1").call().value == 1
engine.shutdown()
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_a_class_that_a_notebook_defines_again(adapter: str) -> None:
    run_python("-c", REDEFINED, adapter)


# -- ways to run a program -----------------------------------------------------------------------------------------

PROGRAM = """
import sys
from engine import Engine

class Adding:
    def __init__(self, number):
        self.number = number
    def __call__(self, request):
        return Sum(helper(self.number) + request.data)

class Sum:
    def __init__(self, value):
        self.value = value

def helper(number):
    return number + constant

constant = 20
engine = Engine("local", http_options={"location": None})
engine.create_backend("adding", Adding, 1)
engine.create_endpoint("adding", backend="adding")
answer = engine.get_handle("adding").call(100)
assert isinstance(answer, Sum)
engine.shutdown()
print(answer.value)
"""


def test_from_a_package_run_by_name(tmp_path: Path) -> None:
    package = tmp_path / "program"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "more.py").write_text("constant = 20")
    text = PROGRAM.replace("constant = 20", "").replace(
        "return number + constant", "from .more import constant\n    return number + constant"
    )
    (package / "__main__.py").write_text(text)
    assert run_python("-m", "program", cwd=tmp_path).strip() == "121"


def test_from_a_doctest(tmp_path: Path) -> None:
    lines = PROGRAM.strip().splitlines()
    shown = [f"{'... ' if line.startswith(' ') else '>>> '}{line}" for line in lines if line.strip()]
    (tmp_path / "tested.py").write_text('"""\n' + "\n".join([*shown, "121"]) + '\n"""\n')
    assert "1 item passed all tests" in run_python("-m", "doctest", "-v", "tested.py", cwd=tmp_path).replace(
        "1 items passed", "1 item passed"
    )


def test_from_the_interactive_interpreter() -> None:
    session = f"import code\ncode.InteractiveConsole(globals()).runsource({PROGRAM!r}, '<console>', 'exec')"
    assert run_python("-c", session).strip() == "121"


def test_from_a_namespace_of_its_own() -> None:
    session = f"exec(compile({PROGRAM!r}, '<cell>', 'exec'), {{'__name__': '__main__'}})"
    assert run_python("-c", session).strip() == "121"


# -- modules that cannot be imported by their name --------------------------------------------------------------------

PLUGIN = """
import dataclasses

@dataclasses.dataclass
class Answer:
    value: int

def helper(number):
    return Answer(2 * number)

def serve(request):
    return helper(request.data.value)
"""

HOST = """
import importlib.util, sys
from engine import Engine

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

plugin = load("a_plugin", sys.argv[1])
engine = Engine(sys.argv[2], http_options={"location": None})
engine.create_backend("plugin", plugin.serve)
engine.create_endpoint("plugin", backend="plugin")
handle = engine.get_handle("plugin")
assert handle.call(plugin.Answer(4)) == plugin.Answer(8)
assert type(handle.call(plugin.Answer(4))) is plugin.Answer
later = load("a_later_plugin", sys.argv[1])
engine.create_backend("module", lambda request: plugin.helper(request.data.value).value)
engine.create_endpoint("module", backend="module")
assert engine.get_handle("module").call(later.Answer(5)) == 10
engine.shutdown()
"""


@pytest.mark.parametrize("adapter", ["local", "inline"])
def test_a_plugin_that_was_loaded_from_its_file(tmp_path: Path, adapter: str) -> None:
    plugin = tmp_path / "of_a_plugin" / "code.py"
    plugin.parent.mkdir()
    plugin.write_text(PLUGIN)
    run_python("-c", HOST, str(plugin), adapter)


def test_a_test_module_that_pytest_imports_from_its_file(tmp_path: Path) -> None:
    directory = tmp_path / "suite"
    directory.mkdir()
    body = textwrap.indent(PROGRAM[PROGRAM.index("engine = ") : PROGRAM.index("print")], "    ")
    text = PROGRAM[: PROGRAM.index("engine = ")] + f"\ndef test_it():\n{body}    assert answer.value == 121\n"
    (directory / "test_of_a_suite.py").write_text(text)
    program = "import pytest, sys; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    assert "1 passed" in run_python("-c", program, *options, str(directory), cwd=tmp_path)


def test_a_submodule_that_only_a_nested_function_uses() -> None:
    program = f"""{PRELUDE}
import starlette.responses

def serve(request):
    return [(lambda: starlette.responses.PlainTextResponse(text).body)() for text in ("a", "b")]

engine = Engine("local", http_options={{"location": None}})
assert call(serve) == [b"a", b"b"]
engine.shutdown()
"""
    run_python("-c", program)

"""What the engine does to the process that embeds it, as little as can be, and where that may come from."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from harness import run_python


def test_importing_is_light():
    heavy = "{'starlette', 'hypercorn', 'multiprocessing', 'uvloop', 'ray', 'numpy', 'fastapi'}"
    code = (
        "import sys; before = set(sys.modules); import engine; engine.Engine;"
        f"sys.stdout.write(' '.join(sorted({heavy} & (set(sys.modules) - before))))"
    )
    assert run_python("-c", code) == ""


def test_importing_starts_nothing():
    code = """
    import os, threading
    import engine
    assert threading.active_count() == 1
    assert len(os.listdir('/proc/self/fd')) == 4, os.listdir('/proc/self/fd')
    """
    run_python("-c", textwrap.dedent(code))


HOST_UNCHANGED = """
import asyncio, logging, os, signal, sys, warnings
from engine import Engine

def state():
    return {
        'signals': [signal.getsignal(number) for number in range(1, signal.NSIG) if number not in (9, 19)],
        'wakeup': signal.set_wakeup_fd(-1),
        'environment': dict(os.environ), 'path': list(sys.path), 'arguments': list(sys.argv), 'cwd': os.getcwd(),
        'root handlers': list(logging.root.handlers), 'root level': logging.root.level,
        'hooks': (sys.excepthook, sys.displayhook, sys.stdout, sys.stderr), 'warnings': list(warnings.filters),
        'umask': os.umask(0o22),
    }

before = state()
with Engine(backend='local', http_options={'port': 0}) as engine:
    engine.create_backend('b', lambda request: 'ok')
    engine.create_endpoint('b', backend='b', route='/b')
    assert engine.get_handle('b').call() == 'ok'
    during = state()
after = state()
for name in before:
    assert before[name] == during[name] == after[name], name
"""


def test_the_host_process_is_left_as_it_was():
    run_python("-c", HOST_UNCHANGED)


# -- without a guard -----------------------------------------------------------------------------------------------

UNGUARDED = """
import os, sys
from engine import Engine

constant = 20

class OfMain:
    def __init__(self, start):
        self.start = start
    def __call__(self, request):
        return Answer(helper(self.start) + request.data, os.getpid())

class Answer:
    def __init__(self, value, pid):
        self.value, self.pid = value, pid

def helper(number):
    return number + constant

engine = Engine(backend='local', http_options={'port': 0})
engine.create_backend('main', OfMain, 1)
engine.create_endpoint('main', backend='main')
answer = engine.get_handle('main').call(100)
assert isinstance(answer, Answer)
assert answer.pid != os.getpid()
engine.shutdown()
sys.stdout.write(str(answer.value))
"""


def test_from_a_script_without_a_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    assert run_python(str(script)) == "121"


def test_from_the_command_line():
    assert run_python("-c", UNGUARDED) == "121"


def test_from_standard_input():
    assert run_python("-", stdin=UNGUARDED) == "121"


def test_from_a_module(tmp_path):
    (tmp_path / "as_module.py").write_text(UNGUARDED)
    assert run_python("-m", "as_module", cwd=tmp_path) == "121"


def test_from_code_that_has_no_file():
    """As a notebook runs a cell: compiled under a made-up name, executed in the namespace of ``__main__``."""
    cell = f"import __main__\nexec(compile({UNGUARDED!r}, '<cell 1>', 'exec'), __main__.__dict__)"
    assert run_python("-c", cell) == "121"


def test_from_a_running_loop_as_in_a_notebook():
    inner = textwrap.indent(UNGUARDED, "    ").replace("constant = 20", "global constant; constant = 20")
    assert run_python("-c", f"import asyncio\nasync def cell():\n{inner}\nasyncio.run(cell())") == "121"


def test_without_standard_streams(tmp_path):
    """Daemons close them; the descriptors 0, 1 and 2 then belong to whoever opens something next."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.replace("sys.stdout.write(", "open('answer', 'w').write("))
    subprocess.run(
        ["/bin/sh", "-c", f"exec {sys.executable} {script} <&- >&- 2>&-"], cwd=tmp_path, check=True, timeout=50
    )
    assert (tmp_path / "answer").read_text() == "121"

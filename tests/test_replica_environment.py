"""What a local replica finds around it, and what becomes of what it writes."""

from __future__ import annotations

import logging
import os
import re
import sys

import pytest

from engine import Engine, errors
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, eventually
from engine_local import LocalAdapter

HTTP = {"host": "127.0.0.1", "port": 0}


@pytest.fixture
def engine():
    with Engine(backend="local", http_options=HTTP) as engine:
        yield engine


def call(engine, function, *arguments, **options):
    """Run a function in a replica made for it."""
    engine.create_backend("once", function, **options)
    engine.create_endpoint("once", backend="once")
    try:
        return engine.get_handle("once").call(*arguments)
    finally:
        engine.delete_endpoint("once")
        engine.delete_backend("once")


def environment(request):
    return dict(os.environ)


def test_working_directory_and_module_path(tmp_path, monkeypatch):
    def backend(request):
        import only_in_this_directory

        return only_in_this_directory.value, os.getcwd()

    (tmp_path / "only_in_this_directory.py").write_text("value = 5")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with Engine(backend="local", http_options=HTTP) as engine:
        assert call(engine, backend) == (5, str(tmp_path))


def test_module_path_changed_after_the_engine_was_made(engine, tmp_path, monkeypatch):
    def backend(request):
        import only_in_a_later_directory

        return only_in_a_later_directory.value, os.getcwd()

    (tmp_path / "only_in_a_later_directory.py").write_text("value = 6")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert call(engine, backend) == (6, str(tmp_path))


def test_environment_of_the_caller(monkeypatch):
    monkeypatch.setenv("OF_THE_CALLER", "1")
    with Engine(backend="local", http_options=HTTP) as engine:
        assert call(engine, environment)["OF_THE_CALLER"] == "1"


def test_env_vars(engine):
    options = {"runtime_env": {"env_vars": {"OF_THE_BACKEND": "2"}}}
    assert call(engine, environment, ray_actor_options=options)["OF_THE_BACKEND"] == "2"
    assert "OF_THE_BACKEND" not in call(engine, environment)
    assert "OF_THE_BACKEND" not in os.environ


THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def test_num_cpus(engine):
    found = call(engine, environment, ray_actor_options={"num_cpus": 2})
    assert {found[name] for name in THREAD_COUNTS} == {"2"}
    options = {"num_cpus": 2, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "7"}}}
    assert call(engine, environment, ray_actor_options=options)["OMP_NUM_THREADS"] == "7"


def visible_gpus(request):
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def serve_gpu(engine, name, amount):
    engine.create_backend(name, visible_gpus, ray_actor_options={"num_gpus": amount})
    engine.create_endpoint(name, backend=name)
    return engine.get_handle(name).call()


class Broken:
    def __init__(self):
        raise ZeroDivisionError


def test_whole_gpus_go_to_one_replica_each():
    with Engine(backend=LocalAdapter(gpus=[4, 7]), http_options=HTTP) as engine:
        assert {serve_gpu(engine, "a", 1), serve_gpu(engine, "b", 1)} == {"4", "7"}
        with pytest.raises(errors.ResourcesUnavailable, match=r"1.*2"):
            serve_gpu(engine, "c", 1)
        engine.delete_endpoint("a")
        engine.delete_backend("a")
        assert serve_gpu(engine, "c", 1) in ("4", "7"), "what a backend had is free again after it"


def test_where_no_gpu_is_free_a_new_version_takes_the_place_of_the_old_one():
    with Engine(backend=LocalAdapter(gpus=[4]), http_options=HTTP) as engine:
        assert serve_gpu(engine, "a", 1) == "4"
        handle = engine.get_handle("a")
        with pytest.raises(errors.ResourcesUnavailable):
            engine.update_backend("a", lambda request: "new")
        assert handle.call() == "4"
        in_place = {"max_surge": 0, "max_unavailable": 1}
        engine.update_backend("a", lambda request: f"new on {visible_gpus(request)}", config=in_place)
        assert handle.call() == "new on 4"
        with pytest.raises(ZeroDivisionError):
            engine.update_backend("a", Broken)
        assert handle.call() == "new on 4", "what had made room is there again"


def test_several_gpus_for_one_replica():
    with Engine(backend=LocalAdapter(gpus=[0, 1, 2]), http_options=HTTP) as engine:
        assert len(serve_gpu(engine, "a", 2).split(",")) == 2


def test_fractions_share_a_gpu():
    with Engine(backend=LocalAdapter(gpus=[4, 7]), http_options=HTTP) as engine:
        first = serve_gpu(engine, "a", 0.5)
        assert serve_gpu(engine, "b", 0.5) == first
        assert serve_gpu(engine, "c", 1) != first
        with pytest.raises(errors.ResourcesUnavailable):
            serve_gpu(engine, "d", 0.25)


def test_no_gpu_unless_asked_for():
    with Engine(backend=LocalAdapter(gpus=[4, 7]), http_options=HTTP) as engine:
        assert call(engine, visible_gpus) in ("", None)


def test_options_for_clusters_are_ignored_with_a_word(engine, caplog):
    with caplog.at_level(logging.INFO, logger="engine"):
        options = {"resources": {"special": 1}, "scheduling_strategy": "SPREAD"}
        assert call(engine, lambda request: "ok", ray_actor_options=options) == "ok"
    scribe().flush(PATIENCE_S)
    words = [record for record in caplog.records if "scheduling_strategy" in record.getMessage()]
    assert len(words) == 1
    assert "resources" in words[0].getMessage()


def test_preloaded_modules_are_there_before_user_code():
    with Engine(backend=LocalAdapter(preload=["wave"]), http_options=HTTP) as engine:
        assert call(engine, lambda request: "wave" in sys.modules)


def test_a_module_that_cannot_be_preloaded(leaves_nothing):
    with pytest.raises(errors.InvalidArgument, match="no_such_module"):
        with Engine(backend=LocalAdapter(preload=["no_such_module"]), http_options=HTTP):
            pytest.fail("the engine must not start")


def test_replicas_are_random_each_in_its_own_way(engine):
    import random

    engine.create_backend("random", lambda request: (os.getpid(), random.random()), config={"num_replicas": 3})
    engine.create_endpoint("random", backend="random")
    handle = engine.get_handle("random")
    first = {}
    eventually(lambda: first.setdefault(*handle.call()) and len(first) == 3)
    assert len(set(first.values())) == 3


def test_where_setproctitle_is_installed_it_names_replicas(tmp_path, monkeypatch):
    (tmp_path / "setproctitle.py").write_text("titles = []\nsetproctitle = titles.append\n")
    monkeypatch.syspath_prepend(tmp_path)
    with Engine(backend="local", http_options=HTTP) as engine:
        titles = call(engine, lambda request: sys.modules["setproctitle"].titles)
    assert titles == ["engine: engine-forks", "engine: replica.once.1"]


def test_standard_input_is_empty(engine):
    assert call(engine, lambda request: sys.stdin.read()) == ""


# -- output --------------------------------------------------------------------------------------------------------


def writes(request):
    sys.stdout.write("to stdout\n")
    sys.stderr.write("to stderr\n")
    os.write(1, b"from below\n")
    logging.getLogger("of.the.user").error("to a logger: %s", 5)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logging.getLogger("of.the.user").exception("with a traceback")


@pytest.fixture
def records(caplog):
    """Finds the record with this text that came from a replica."""
    caplog.set_level(logging.INFO)

    def find(text):
        def found():
            return [record for record in caplog.records if text in record.getMessage() and "replica" in record.name]

        (record,) = eventually(found)
        return record

    return find


def test_output_becomes_log_records(engine, records):
    engine.create_backend("loud", writes)
    engine.create_endpoint("loud", backend="loud")
    engine.get_handle("loud").call()
    assert records("to stdout").levelno == logging.INFO
    assert records("from below").levelno == logging.INFO
    assert records("to stderr").levelno == logging.WARNING
    assert records("to a logger: 5").levelno == logging.ERROR
    assert "ZeroDivisionError" in records("with a traceback").getMessage()
    assert re.fullmatch(r"engine\.replica\.loud\.\d+", records("to stdout").name)


def test_records_name_the_replica(engine, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    engine.create_backend("numbered", lambda request: sys.stdout.write("here\n"), config={"num_replicas": 2})
    engine.create_endpoint("numbered", backend="numbered")
    handle = engine.get_handle("numbered")

    def names():
        handle.call()
        return {record.name for record in caplog.records if record.getMessage().endswith("here")}

    eventually(lambda: len(names()) == 2)


def test_output_before_a_death_is_not_lost(engine, records):
    def backend(request):
        os.write(2, b"last words without an end of line")
        os._exit(1)

    engine.create_backend("dies", backend)
    engine.create_endpoint("dies", backend="dies")
    with pytest.raises(errors.ReplicaDied):
        engine.get_handle("dies").call()
    assert records("last words").levelno == logging.WARNING


def test_output_of_a_constructor_that_fails(engine, records):
    class Backend:
        def __init__(self):
            sys.stdout.write("about to fail\n")
            raise KeyError("failed")

    with pytest.raises(KeyError):
        engine.create_backend("fails", Backend)
    assert records("about to fail")


def test_a_flood_of_output_blocks_nobody(engine, records):
    def backend(request):
        for number in range(20_000):
            sys.stdout.write(f"line {number} " + "x" * 100 + "\n")
        return "done"

    assert call(engine, backend) == "done"


def test_the_level_of_the_engines_process_holds(engine, caplog):
    """With the root at WARNING nobody here would see an INFO, so none needs to be sent."""

    def backend(request):
        logging.getLogger("of.the.user").info("too quiet")
        logging.getLogger("of.the.user").warning("loud enough")

    caplog.set_level(logging.WARNING)
    with Engine(backend="local", http_options=HTTP) as quiet:
        call(quiet, backend)
        eventually(lambda: "loud enough" in caplog.text)
    scribe().flush(PATIENCE_S)
    assert "too quiet" not in caplog.text

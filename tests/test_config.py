"""Options: which values pass, and what is said of those that don't."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from typing import Any

import pytest
from starlette.middleware import Middleware

from engine import BackendConfig, HTTPOptions
from engine.errors import InvalidArgument, ReplicaDied, RetryLater
from engine.seam.resources import Resources, resources_of

NAN, INFINITY = float("nan"), float("inf")

# -- BackendConfig ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_replicas", 1),
        ("num_replicas", 64),
        ("max_concurrent_queries", None),
        ("max_concurrent_queries", 1),
        ("max_queued_requests", 0),
        ("max_queued_requests", None),
        ("max_batch_size", 1),
        ("batch_wait_timeout", 0),
        ("batch_wait_timeout", 0.5),
        ("user_config", {"any": "thing"}),
        ("graceful_shutdown_timeout_s", 0),
        ("start_timeout_s", 0.1),
        ("cancel_running", False),
        ("cancel_grace_s", None),
        ("cancel_grace_s", 0),
        ("max_surge", 0),
        ("max_surge", "25%"),
        ("max_unavailable", "0%"),
        ("max_calls_per_replica", None),
        ("max_rss_mb", 0.5),
        ("max_age_s", None),
        ("max_call_s", None),
        ("max_call_s", 0.5),
        ("stuck_after_s", None),
        ("stuck_after_s", INFINITY),
        ("health_check_period_s", None),
        ("health_check_threshold", 1),
    ],
)
def test_a_backend_takes(field: str, value: Any) -> None:
    assert getattr(BackendConfig(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("num_replicas", 0, "an integer of at least 1"),
        ("num_replicas", -1, "an integer of at least 1"),
        ("num_replicas", 1.0, "an integer of at least 1"),
        ("num_replicas", True, "an integer of at least 1"),
        ("num_replicas", "2", "an integer of at least 1"),
        ("num_replicas", None, "an integer of at least 1"),
        ("max_concurrent_queries", 0, "an integer of at least 1 or None"),
        ("max_queued_requests", -1, "an integer of at least 0 or None"),
        ("max_queued_bytes", 0, "an integer of at least 1 or None"),
        ("max_batch_size", 0, "an integer of at least 1 or None"),
        ("batch_wait_timeout", -0.1, "a number of seconds of at least 0 (and at most a year)"),
        ("batch_wait_timeout", None, "a number of seconds of at least 0 (and at most a year)"),
        ("batch_wait_timeout", False, "a number of seconds of at least 0 (and at most a year)"),
        ("graceful_shutdown_timeout_s", NAN, "a number of seconds of at least 0 (and at most a year)"),
        ("start_timeout_s", INFINITY, "a number of seconds of at least 0 (and at most a year)"),
        ("cancel_running", 1, "True or False"),
        ("cancel_grace_s", -1, "a number of seconds of at least 0 (and at most a year) or None"),
        ("max_surge", -1, 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_surge", True, 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_surge", 0.25, 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_unavailable", "101%", 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_unavailable", "%", 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_unavailable", "2", 'a number of replicas of at least 0 or a percentage such as "25%"'),
        ("max_calls_per_replica", 0, "an integer of at least 1 or None"),
        ("max_rss_mb", 0, "a number of megabytes above 0 or None"),
        ("max_rss_mb", INFINITY, "a number of megabytes above 0 or None"),
        ("max_age_s", 0, "a number of seconds above 0 (and at most a year), or None"),
        ("max_call_s", 0, "a number of seconds above 0 (and at most a year), or None"),
        ("max_call_s", INFINITY, "a number of seconds above 0 (and at most a year), or None"),
        ("health_check_period_s", 0, "a number of seconds above 0 (and at most a year), or None"),
        ("health_check_threshold", 0, "an integer of at least 1"),
        ("stuck_after_s", 0, "a number of seconds above 0 (and at most a year), math.inf or None"),
        ("stuck_after_s", NAN, "a number of seconds above 0 (and at most a year), math.inf or None"),
        ("stuck_after_s", True, "a number of seconds above 0 (and at most a year), math.inf or None"),
    ],
)
def test_a_backend_refuses(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        BackendConfig(**{field: value})
    assert str(caught.value) == f"config: {field} must be {allowed}, not {value!r}"


def test_a_backends_config_is_a_dict_or_an_object_or_nothing() -> None:
    config = BackendConfig(num_replicas=3)
    assert BackendConfig.of({"num_replicas": 3}) == config
    assert BackendConfig.of(config) == config
    assert BackendConfig.of(config) is not config, "what the user may change later is not what rules"
    assert BackendConfig.of(None) == BackendConfig()
    with pytest.raises(InvalidArgument, match=r"^config must be a dict or BackendConfig, not 3$"):
        BackendConfig.of(3)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgument, match=r"^config: unknown field 'replicas'; the fields are num_replicas, "):
        BackendConfig.of({"replicas": 3})


def test_an_update_changes_what_it_names_and_nothing_else() -> None:
    config = BackendConfig(num_replicas=3, user_config="a")
    assert config.updated({"user_config": "b"}) == BackendConfig(num_replicas=3, user_config="b")
    assert config.user_config == "a"
    with pytest.raises(InvalidArgument, match="num_replicas"):
        config.updated({"num_replicas": 0})


def test_what_is_stuck_by_default_is_nothing_legal() -> None:
    config = BackendConfig()
    assert config.patience_s(on_loop=True) == 60.0
    assert config.patience_s(on_loop=False) == INFINITY
    assert config.patience_s(on_loop=True, shares_process=True) == INFINITY
    config.stuck_after_s = 5
    assert config.patience_s(on_loop=False) == config.patience_s(on_loop=True, shares_process=True) == 5


def test_what_calls_are_repeated_on_is_kept_by_name() -> None:
    class Own(Exception):
        pass

    assert BackendConfig().retry_on == ("engine.errors.ReplicaDied",)
    config = BackendConfig(retry_on=[Own, ConnectionError, "OSError", "some.module.Error"])
    own = f"{__name__}.test_what_calls_are_repeated_on_is_kept_by_name.<locals>.Own"
    assert config.retry_on == (own, "builtins.ConnectionError", "builtins.OSError", "some.module.Error")
    assert pickle.loads(pickle.dumps(config)) == config
    assert BackendConfig(retry_on=Own).retry_on == (own,)
    assert BackendConfig(retry_on=config.retry_on) == config
    for wrong in (3, [int], [Own()], "not a name", None):
        with pytest.raises(InvalidArgument, match=r"^config: retry_on must be types of exceptions, or full names such"):
            BackendConfig(retry_on=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [([], False), ([ReplicaDied], True), ([RetryLater], True), ([Exception], True), ([OSError], False)],
)
def test_the_death_of_a_replica_is_named_by_any_type_that_has_it(kinds: Any, expected: bool) -> None:
    assert BackendConfig(retry_on=kinds).retries_deaths == expected


def set_in(config: BackendConfig) -> dict[str, Any]:
    """The fields that were set, as an update by this configuration shows them."""
    marked: dict[str, Any] = {field: 77 for field in BackendConfig.__dataclass_fields__}
    marked |= {"cancel_running": False, "retry_posts": True, "retry_on": ("a.B",)}
    updated = BackendConfig(**marked).updated(config)
    return {field: value for field, value in dataclasses.asdict(updated).items() if value != marked[field]}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (BackendConfig(), {}),
        (BackendConfig(user_config=2), {"user_config": 2}),
        (BackendConfig(num_replicas=1), {"num_replicas": 1}),  # as it is by default, but said
        (BackendConfig(2, None), {"num_replicas": 2, "max_concurrent_queries": None}),
        (pickle.loads(pickle.dumps(BackendConfig(user_config=[1]))), {"user_config": [1]}),
        (copy.deepcopy(BackendConfig(num_replicas=3)), {"num_replicas": 3}),
        (BackendConfig.of({"max_batch_size": 4}), {"max_batch_size": 4}),
        (BackendConfig(user_config=1).updated({"num_replicas": 2}), {"user_config": 1, "num_replicas": 2}),
        (BackendConfig(user_config=1).updated(BackendConfig(user_config=2)), {"user_config": 2}),
    ],
)
def test_an_update_by_an_object_changes_what_was_set_in_it(config: BackendConfig, expected: dict[str, Any]) -> None:
    assert set_in(config) == expected


def test_it_can_be_filled_in_after_construction() -> None:
    config = BackendConfig()
    config.num_replicas = 2
    config.user_config = "a"
    assert config == BackendConfig(num_replicas=2, user_config="a")
    assert set_in(config) == {"num_replicas": 2, "user_config": "a"}
    with pytest.raises(InvalidArgument, match=r"^config: num_replicas must be an integer of at least 1, not 0$"):
        config.num_replicas = 0
    with pytest.raises(InvalidArgument, match=r"^config: unknown field 'num_replica'; the fields are num_replicas, "):
        config.num_replica = 2
    assert config.num_replicas == 2


def test_what_was_slipped_in_is_found_when_it_is_used() -> None:
    config = BackendConfig()
    vars(config)["num_replicas"] = "2"
    with pytest.raises(InvalidArgument, match="num_replicas"):
        BackendConfig.of(config)


def test_it_is_a_dataclass_to_whoever_looks() -> None:
    config = BackendConfig(num_replicas=2)
    assert dataclasses.asdict(config) == {**dataclasses.asdict(BackendConfig()), "num_replicas": 2}
    assert dataclasses.replace(config, num_replicas=3) == BackendConfig(num_replicas=3)
    assert repr(config).startswith("BackendConfig(num_replicas=2, max_concurrent_queries=None, ")
    assert hash(config) == hash(BackendConfig(num_replicas=2, max_batch_size=None))
    assert list(inspect.signature(BackendConfig).parameters) == [field.name for field in dataclasses.fields(config)]


@pytest.mark.parametrize(
    ("options", "blocking", "expected"),
    [
        ({}, True, 8),
        ({}, False, 1_000_000),
        ({"max_batch_size": 5}, True, 10),
        ({"max_batch_size": 5}, False, 1_000_000),
        ({"max_concurrent_queries": 3, "max_batch_size": 5}, True, 3),
        ({"max_concurrent_queries": 3}, False, 3),
    ],
)
def test_how_many_calls_a_replica_holds(options: dict[str, Any], blocking: bool, expected: int) -> None:
    assert BackendConfig(**options).concurrency(on_loop=not blocking) == expected


def test_it_travels() -> None:
    config = BackendConfig(num_replicas=2, user_config=[1])
    assert pickle.loads(pickle.dumps(config)) == config


# -- HTTPOptions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("location", "HeadOnly"),
        ("location", "EveryNode"),
        ("location", "NoServer"),
        ("location", None),
        ("host", "::1"),
        ("host", None),
        ("port", 0),
        ("port", 65535),
        ("workers", 2),
        ("max_body_bytes", 0),
        ("request_timeout_s", None),
        ("request_timeout_s", 0.5),
        ("debug", True),
        ("status_details", None),
        ("status_details", False),
        ("priority_header", None),
        ("priority_header", "X-Priority"),
        ("middlewares", [Middleware(object), lambda app: app]),  # type: ignore[arg-type]
        ("middlewares", ()),
    ],
)
def test_http_takes(field: str, value: Any) -> None:
    assert getattr(HTTPOptions.of({field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("location", "Nowhere", '"HeadOnly", "EveryNode", "NoServer" or None'),
        ("host", "", "an address, a host name or None"),
        ("host", 5, "an address, a host name or None"),
        ("port", -1, "an integer from 0 to 65535"),
        ("port", 65536, "an integer from 0 to 65535"),
        ("port", "80", "an integer from 0 to 65535"),
        ("workers", 0, "an integer of at least 1"),
        ("max_connections", 0, "an integer of at least 1"),
        ("max_body_bytes", -1, "an integer of at least 0"),
        ("request_timeout_s", -1, "a number of seconds of at least 0 (and at most a year)"),
        ("request_timeout_s", "1", "a number of seconds of at least 0 (and at most a year)"),
        ("debug", 1, "True or False"),
        ("stall_timeout_s", 0, "a number of seconds above 0 (and at most a year), or None"),
        ("status_details", "no", "True or False"),
        ("priority_header", "", "the name of a header or None"),
        ("priority_header", "x priority", "the name of a header or None"),
        ("priority_header", True, "the name of a header or None"),
        ("middlewares", "cors", "a list"),
        ("middlewares", None, "a list"),
    ],
)
def test_http_refuses(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        HTTPOptions(**{field: value})
    assert str(caught.value) == f"http_options: {field} must be {allowed}, not {value!r}"


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("127.0.0.1.example.org", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        (None, False),
    ],
)
def test_only_the_machine_itself_is_told_details_by_default(host: str | None, told: bool) -> None:
    assert HTTPOptions(host=host).tells_details is told
    for details in (True, False):
        assert HTTPOptions(host=host, status_details=details).tells_details is details


def test_http_says_which_middleware_is_none() -> None:
    with pytest.raises(InvalidArgument, match=r"^http_options: middlewares\[1\] must be a starlette Middleware or "):
        HTTPOptions(middlewares=[lambda app: app, "cors"])


def test_http_options_are_a_dict_or_an_object_or_nothing() -> None:
    options = HTTPOptions(port=1)
    assert HTTPOptions.of(options) is options
    assert HTTPOptions.of(None) == HTTPOptions()
    with pytest.raises(InvalidArgument, match=r"^http_options must be a dict or HTTPOptions, not 8000$"):
        HTTPOptions.of(8000)  # type: ignore[arg-type]


def test_what_http_does_not_know_is_the_servers() -> None:
    given = {"port": 1, "backlog": 5, "server_options": {"keyfile": "key"}}
    assert HTTPOptions.of(given).server_options == {"keyfile": "key", "backlog": 5}
    assert given == {"port": 1, "backlog": 5, "server_options": {"keyfile": "key"}}  # left as it was
    with pytest.raises(InvalidArgument, match="http_options: server_options must be a dict, not None"):
        HTTPOptions.of({"server_options": None})


@pytest.mark.parametrize(
    ("location", "serves"), [("HeadOnly", True), ("EveryNode", True), ("NoServer", False), (None, False)]
)
def test_where_http_is_served(location: str | None, serves: bool) -> None:
    assert HTTPOptions(location=location).serves is serves
    assert not HTTPOptions(location=location, host=None).serves


# -- ray_actor_options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, Resources()),
        ({}, Resources()),
        ({"num_cpus": 2, "num_gpus": 0.5}, Resources(2.0, 0.5)),
        ({"num_cpus": 0}, Resources(0.0)),
        ({"num_cpus": None, "num_gpus": None}, Resources()),
        ({"runtime_env": None}, Resources()),
        ({"runtime_env": {"env_vars": {"A": "1"}}}, Resources(env_vars={"A": "1"})),
        ({"runtime_env": {"env_vars": None}}, Resources()),
        (
            {"runtime_env": {"env_vars": {"A": "1"}, "pip": ["x"]}, "memory": 5},
            Resources(env_vars={"A": "1"}, other={"memory": 5, "runtime_env": {"pip": ["x"]}}),
        ),
        ({"runtime_env": {"our_plug_in": 1}}, Resources(other={"runtime_env": {"our_plug_in": 1}})),
    ],
)
def test_resources(options: Any, expected: Resources) -> None:
    assert resources_of(options) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (3, "ray_actor_options must be a dict, not 3"),
        ({"num_cpu": 1}, "ray_actor_options: unknown option 'num_cpu'; did you mean 'num_cpus'?"),
        (
            {"runtime_env": {"env_var": {}}},
            "ray_actor_options: runtime_env has no field 'env_var'; did you mean 'env_vars'?",
        ),
        ({"num_cpus": -1}, "ray_actor_options: num_cpus must be a number of at least 0, not -1"),
        ({"num_cpus": 10**400}, "ray_actor_options: num_cpus must be a number of at least 0, not 1" + 400 * "0"),
        ({"num_cpus": True}, "ray_actor_options: num_cpus must be a number of at least 0, not True"),
        ({"num_gpus": "1"}, "ray_actor_options: num_gpus must be a number of at least 0, not '1'"),
        ({"num_gpus": NAN}, "ray_actor_options: num_gpus must be a number of at least 0, not nan"),
        ({"num_gpus": INFINITY}, "ray_actor_options: num_gpus must be a number of at least 0, not inf"),
        ({"runtime_env": 3}, "ray_actor_options: runtime_env must be a dict, not 3"),
        (
            {"runtime_env": {"env_vars": ["A"]}},
            "ray_actor_options: runtime_env['env_vars'] must map str to str, not ['A']",
        ),
        (
            {"runtime_env": {"env_vars": {"A": 1}}},
            "ray_actor_options: runtime_env['env_vars'] must map str to str, not {'A': 1}",
        ),
    ],
)
def test_resources_that_are_none(options: Any, message: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        resources_of(options)
    assert str(caught.value) == message


def test_the_options_given_are_left_as_they_were() -> None:
    options = {"num_cpus": 1, "runtime_env": {"env_vars": {"A": "1"}, "pip": []}}
    resources_of(options)
    assert options == {"num_cpus": 1, "runtime_env": {"env_vars": {"A": "1"}, "pip": []}}

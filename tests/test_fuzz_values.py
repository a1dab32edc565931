"""What users and clients give: any value is taken or refused by the error that says so, and never fails in between."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

from fuzzing import fuzzed
from hypercorn.config import Config
from hypothesis import strategies as st

from engine.calling.handle import CallOptions, _header_pairs
from engine.calling.traffic import hash_fraction, validate_proportion, validate_weights
from engine.config import LONGEST_S, BackendConfig, HTTPOptions
from engine.errors import InvalidArgument
from engine.http.exchange import request_id_of
from engine.http.heads import decode_head, encode_head
from engine.http.ingress import _seconds, _text
from engine.http.routes import validate_route
from engine.seam.error_text import message_of, shortened, summary_of, traceback_of
from engine.seam.http_request import build_http_request, trim_scope
from engine.seam.resources import ACTOR_OPTIONS, resources_of
from engine.seam.serialization import pack_exception, unpack_exception
from engine_http import HypercornServer

_TEXTS = st.one_of(st.text(max_size=12), st.text("\ud800\x00\n%{}/:@é٣²", max_size=6))
_NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([10**400, -(10**400), 2**63, 0.5, 1e308, math.inf, -math.inf, math.nan]),
    st.fractions(0, 2),
    st.decimals(),
    st.booleans(),
)
_ATOMS = st.one_of(
    st.none(),
    _NUMBERS,
    _TEXTS,
    st.binary(max_size=4),
    st.sampled_from(
        [int, ValueError, BaseException, object(), len, complex(1, 2), Ellipsis, "25%", "²%", "9" * 5000 + "%"]
    ),
)
_VALUES = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(_TEXTS, inner, max_size=3),
    ),
    max_leaves=5,
)
_FIELDS = [field.name for field in dataclasses.fields(BackendConfig)]
_HTTP_FIELDS = [field.name for field in dataclasses.fields(HTTPOptions)]
_SERVER_SETTINGS = sorted(name for name in Config.__annotations__ if not name.startswith("_"))


@fuzzed(field=st.one_of(st.sampled_from(_FIELDS), _TEXTS), value=_VALUES)
def test_a_field_of_a_backends_configuration(field: str, value: Any) -> None:
    try:
        config = BackendConfig.of({field: value})
    except InvalidArgument as error:
        assert str(error)
        return
    assert field in _FIELDS
    if field not in ("retry_on", "user_config"):
        assert getattr(config, field) is value
    config.limits, config.concurrency(on_loop=True), config.patience_s(on_loop=True), config.retries_deaths
    assert BackendConfig.of(config) is not config


@fuzzed(value=_VALUES)
def test_all_of_a_backends_configuration(value: Any) -> None:
    for take in (BackendConfig.of, HTTPOptions.of, resources_of, validate_weights, validate_proportion, validate_route):
        try:
            take(value)
        except InvalidArgument as error:
            assert str(error)


@fuzzed(field=st.one_of(st.sampled_from(_HTTP_FIELDS), st.sampled_from(_SERVER_SETTINGS), _TEXTS), value=_VALUES)
def test_an_option_of_http(field: str, value: Any) -> None:
    try:
        options = HTTPOptions.of({field: value})
        HypercornServer().validate(options)
    except InvalidArgument as error:
        assert str(error)
        return
    options.serves, options.tells_details  # noqa: B018


@fuzzed(name=st.sampled_from(ACTOR_OPTIONS), value=_VALUES)
def test_an_option_of_actors(name: str, value: Any) -> None:
    try:
        resources_of({name: value})
    except InvalidArgument as error:
        assert str(error)


@fuzzed(name=st.sampled_from(sorted(CallOptions.__dataclass_fields__)), value=_VALUES)
def test_an_option_of_a_call(name: str, value: Any) -> None:
    try:
        if name == "http_headers":
            value = _header_pairs(value)
        options = CallOptions(**{name: value})
        options.head(), options.retries()
    except InvalidArgument as error:
        assert str(error)
        return
    # it travels, and has a place
    options.method_name.encode()
    if options.shard_key is not None:
        assert 0 <= hash_fraction(options.shard_key) < 1


@fuzzed(weights=st.dictionaries(_TEXTS, _NUMBERS, max_size=3))
def test_weights(weights: dict[str, Any]) -> None:
    try:
        checked = validate_weights(weights)
    except InvalidArgument as error:
        assert str(error)
        return
    assert checked.keys() == weights.keys()
    assert all(0 <= weight <= 1.1 for weight in checked.values()) and math.isclose(
        sum(checked.values()), 1, abs_tol=1e-3
    )


# -- what HTTP clients send --------------------------------------------------------------------------------------------


_HEADER_BYTES = st.one_of(st.binary(max_size=20), st.sampled_from([b"9" * 5000, b"\xb2", b" 12 ", b"+1", b"1_0", b"0"]))


@fuzzed(value=_HEADER_BYTES)
def test_a_header_that_the_ingress_reads(value: bytes) -> None:
    seconds = _seconds(value)
    assert seconds is None or 0 < seconds <= LONGEST_S
    assert 0 <= hash_fraction(_text(value)) < 1
    request_id = request_id_of(value)
    assert request_id.isascii() and request_id.isprintable() and 0 < len(request_id) <= 200


_PAIRS = st.lists(
    st.tuples(
        st.one_of(st.sampled_from([b"a", b"content-length", b"A-b"]), st.binary(max_size=4)),
        st.one_of(_HEADER_BYTES, st.sampled_from([b"a\r\nb: c", b"a\nb", b"\x00"])),
    ),
    max_size=3,
)


@fuzzed(
    status=st.one_of(st.integers(100, 1000), _ATOMS), headers=_PAIRS, length=st.one_of(st.none(), st.integers(0, 9))
)
def test_a_head_comes_back_as_it_was_or_is_refused(status: Any, headers: Any, length: int | None) -> None:
    try:
        head = encode_head(status, headers, length)
    except ValueError as error:
        assert str(error)
        return
    assert decode_head(head) == (status, headers)
    for name, value in headers:
        assert b"\r" not in name + value and b"\n" not in name + value and b"\x00" not in name + value and name


@fuzzed(
    headers=st.lists(st.tuples(st.binary(max_size=6), st.binary(max_size=6)), max_size=3),
    query=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12).map(str.encode),
    path=_TEXTS,
    body=st.binary(max_size=12),
    extras=st.dictionaries(_TEXTS, _ATOMS, max_size=2),
)
def test_a_request_travels(
    headers: list[tuple[bytes, bytes]], query: bytes, path: str, body: bytes, extras: dict[str, Any]
) -> None:
    known = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": query}
    scope = {"asgi": {}, "state": dict(extras), **{f"own.{key}": value for key, value in extras.items()}, **known}
    request = build_http_request(pickle.dumps(trim_scope(scope), 5), body)
    assert {name: request.scope[name] for name in known} == known
    assert request.headers.raw == headers
    list(request.headers.items()), dict(request.query_params), dict(request.cookies), str(request.url)


# -- errors ------------------------------------------------------------------------------------------------------------


class _Nasty(Exception):
    """An exception whose own methods do what they like."""

    def __init__(self, given: Any) -> None:
        super().__init__(given)
        self.given = given

    def __str__(self) -> str:
        if isinstance(self.given, str):
            return self.given
        raise KeyboardInterrupt(self.given)

    def __reduce__(self) -> Any:
        if isinstance(self.given, int):
            raise SystemExit(self.given)
        return super().__reduce__()


@fuzzed(given=_ATOMS, kind=st.sampled_from([ValueError, _Nasty, KeyError, OSError]), most=st.integers(2, 50))
def test_any_error_can_be_told_and_travels(given: Any, kind: Any, most: int) -> None:
    error = kind(given)
    for tell in (message_of, summary_of, traceback_of):
        assert type(tell(error)) is str
    assert len(shortened(message_of(error), most)) <= max(len(message_of(error)), most + 60)
    copy = unpack_exception(pack_exception(error))
    assert isinstance(copy, BaseException)

"""Which HTTP status says what, and what error answers tell the client."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi import HTTPException as FastAPIHTTPException
from starlette.exceptions import HTTPException

from engine import errors, get_replica_context
from engine.testing.instruments import eventually

SECRET = "the secret of the backend"


def ok(request):
    return "ok"


def raises_secret(request):
    raise ValueError(SECRET)


@pytest.fixture(scope="module")
def strict(adapter):
    """An engine with narrow limits and an answer in 503 time."""
    with adapter.engine(max_body_bytes=1000, request_timeout_s=1.0) as engine:
        yield engine


@pytest.fixture
def strict_url(strict, gate):
    async def length(request):
        return len(await request.body())

    def held(request):
        gate.pass_through()
        return "late"

    strict.create_backend("length", length)
    strict.create_endpoint("length", backend="length", route="/length", methods=["POST"])
    strict.create_backend("held", held)
    strict.create_endpoint("held", backend="held", route="/held")
    yield strict.http_url
    gate.open()
    for name in ("length", "held"):
        strict.delete_endpoint(name)
        strict.delete_backend(name)


def test_no_such_route(serve_once, client):
    served = serve_once(ok)
    for path in (f"{served.route}/more", "/nowhere", f"{served.route}x", "/"):
        assert client.get(f"{served.engine.http_url}{path}").status_code == 404
    assert served.http().status_code == 200


def test_wrong_verb_says_which_are_allowed(serve):
    served = serve(lambda request: "ok", methods=["POST", "PUT"])
    response = served.http("DELETE")
    assert response.status_code == 405
    assert {verb.strip() for verb in response.headers["allow"].split(",")} == {"POST", "PUT"}
    assert served.http("PUT").status_code == 200


def test_get_is_the_default_verb(engine, serve, client):
    served = serve(lambda request: "ok", route=None)
    engine.create_endpoint(f"{served.name}-default", backend=served.tag, route=f"/{served.name}-default")
    try:
        url = f"{engine.http_url}/{served.name}-default"
        assert client.get(url).status_code == 200
        assert client.post(url).status_code == 405
    finally:
        engine.delete_endpoint(f"{served.name}-default")


@pytest.mark.parametrize("method", ["absent", "_hidden", "__init__", "no identifier", "a" * 5000])
def test_bad_method_header(serve_once, method):
    served = serve_once(ok)
    assert served.http(headers={"X-SERVE-CALL-METHOD": method}).status_code == 400
    assert served.http().status_code == 200


def test_body_over_the_limit(strict_url, client):
    assert client.post(f"{strict_url}/length", content=b"x" * 1000).text == "1000"
    assert client.post(f"{strict_url}/length", content=b"x" * 1001).status_code == 413


def test_body_over_the_limit_that_does_not_say_so_first(strict_url, client):
    def parts(count):
        for _ in range(count):
            yield b"x" * 100

    assert client.post(f"{strict_url}/length", content=parts(10)).text == "1000"
    assert client.post(f"{strict_url}/length", content=parts(11)).status_code == 413


def test_deadline_passed(strict_url, client, gate):
    assert client.get(f"{strict_url}/held").status_code == 504
    assert gate.arrivals() == 1
    gate.open()
    assert eventually(lambda: client.get(f"{strict_url}/held").text) == "late"


def test_user_error_does_not_leak(serve_once, caplog):
    served = serve_once(raises_secret)
    response = served.http()
    assert response.status_code == 500
    assert response.text == "Internal Server Error"
    assert response.headers["content-type"].startswith("text/plain")
    assert SECRET not in str(response.headers)
    eventually(lambda: SECRET in caplog.text and "raise ValueError(SECRET)" in caplog.text)


async def calls_in_vain(request):
    """A call of its own, or an error of the engine's that it raises itself, as the request asks."""
    wrong = request.query_params["wrong"]
    if hasattr(errors, wrong):
        raise getattr(errors, wrong)(f"by me: {wrong}")
    if wrong == "endpoint":
        return await get_replica_context().get_handle("no such").call(1)
    handle = get_replica_context().get_handle(request.query_params["other"])
    if wrong == "method":
        return await handle.options(method_name="predct").call(1)
    return await handle.call(threading.Lock()) if wrong == "argument" else await handle.call(1, timeout_s=3)


@pytest.mark.parametrize(
    ("wrong", "logged"),
    [
        ("method", "MethodNotFound: backend"),
        ("endpoint", "EndpointNotFound: there is no endpoint 'no such'"),
        ("argument", "NotSerializable: "),
        ("option", "timeout_s"),
        ("MethodNotFound", "by me: MethodNotFound"),
        ("EndpointNotFound", "by me: EndpointNotFound"),
        ("InvalidArgument", "by me: InvalidArgument"),
        ("WouldBlock", "by me: WouldBlock"),
        ("EngineError", "by me: EngineError"),
    ],
)
def test_a_backends_own_call_that_was_wrong_is_its_failure(serve_once, caplog, wrong, logged):
    other = serve_once(ok)
    response = serve_once(calls_in_vain).http(params={"wrong": wrong, "other": other.name})
    assert (response.status_code, response.text) == (500, "Internal Server Error")
    eventually(lambda: logged in caplog.text and "in calls_in_vain" in caplog.text)


@pytest.mark.parametrize(
    ("wrong", "status"), [("Overloaded", 503), ("NoReplica", 503), ("DeadlineExceeded", 504), ("ReplicaDied", 502)]
)
def test_what_a_backends_own_call_has_to_wait_for_is_passed_on(serve_once, wrong, status):
    assert serve_once(calls_in_vain).http(params={"wrong": wrong}).status_code == status


def test_user_error_with_debug(own_engine, client):
    engine = own_engine(debug=True)
    engine.create_backend("raises", raises_secret)
    engine.create_endpoint("raises", backend="raises", route="/raises")
    response = client.get(f"{engine.http_url}/raises")
    assert response.status_code == 500
    assert SECRET in response.text
    assert "raise ValueError(SECRET)" in response.text


@pytest.mark.parametrize("error", [HTTPException, FastAPIHTTPException])
def test_http_exception_gives_its_status(serve, error):
    def backend(request):
        raise error(418, "short and stout", headers={"X-Pot": "tea"})

    served = serve(backend)
    response = served.http()
    assert response.status_code == 418
    assert "short and stout" in response.text
    assert response.headers["x-pot"] == "tea"
    with pytest.raises(error) as caught:
        served.call()
    assert (caught.value.status_code, caught.value.detail) == (418, "short and stout")


def held_backend(gate, kind):
    def sync(request):
        gate.pass_through()
        return "done"

    async def asynchronous(request):
        await gate.apass_through()
        return "done"

    return sync if kind == "sync" else asynchronous


FULL = {"max_concurrent_queries": 1, "max_queued_requests": 0}


@pytest.mark.parametrize("kind", ["sync", "async"])
@pytest.mark.parametrize("other", ["http", "handle"])
def test_queue_full(serve, gate, kind, other):
    """Whoever it is that keeps the replica busy, the next client hears so while it is."""
    served = serve(held_backend(gate, kind), config=FULL)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(served.http_text if other == "http" else served.handle.call)
        try:
            gate.wait_for_arrivals(1)
            response = served.http(timeout=10)
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 0
        finally:
            gate.open()
        assert first.result(20) == "done"
    assert eventually(lambda: served.http().status_code == 200)


def test_request_id_is_kept(serve):
    served = serve(lambda request: request.headers.get("x-request-id"))
    assert served.http(headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_request_id_is_made(serve_once):
    served = serve_once(ok)
    ids = {served.http().headers["x-request-id"] for _ in range(3)}
    assert len(ids) == 3
    assert all(ids)


def test_error_answers_have_a_request_id_too(serve_once, client):
    served = serve_once(raises_secret)
    for url in (served.url, f"{served.url}/nowhere"):
        assert client.get(url, headers={"X-Request-ID": "mine-2"}).headers["x-request-id"] == "mine-2"


def test_request_id_is_logged(serve_once, caplog):
    serve_once(raises_secret).http(headers={"X-Request-ID": "mine-3"})
    eventually(lambda: "mine-3" in caplog.text)


def test_health(serve_once, client):
    response = client.get(f"{serve_once(raises_secret).engine.http_url}/-/healthz")
    assert response.status_code == 200


def test_readiness(serve_once, client):
    served = serve_once(raises_secret)
    url = f"{served.engine.http_url}/-/readyz"
    answer = client.get(url, params={"backend": served.tag})
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "backends": {served.tag: {"ready": True, "replicas": 1}}}
    assert served.tag in client.get(url).json()["backends"]
    assert client.get(url, params={"backend": "no such"}).status_code == 404


def test_a_websocket_is_refused_and_the_log_says_on_which_route(serve_once, client, caplog):
    served = serve_once(raises_secret)
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    response = client.get(served.url, headers=upgrade)
    assert (response.status_code, response.text) == (501, "This route does not serve WebSockets.")
    eventually(lambda: f"refused a WebSocket on {served.route}: endpoint '{served.name}'" in caplog.text)


def test_routes_are_listed(serve, client):
    served = serve(raises_secret, methods=["GET", "PUT"])
    listed = client.get(f"{served.engine.http_url}/-/routes").json()
    assert listed[served.route]["endpoint"] == served.name
    assert {"GET", "PUT"} <= set(listed[served.route]["methods"])


def test_requests_side_by_side_get_their_own_answers(serve):
    served = serve(lambda request: request.query_params["n"], config={"num_replicas": 2})
    answers: dict[int, str] = {}

    def ask(numbers):
        for number in numbers:
            answers[number] = served.http(params={"n": number}).text

    threads = [threading.Thread(target=ask, args=(range(start, 100, 8),)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: str(number) for number in range(100)}


@pytest.mark.parametrize("framing", ["content-length: 10\r\n\r\nabc", "transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n"])
def test_the_rest_of_a_request_is_not_waited_for_without_end(own_engine, framing):
    engine = own_engine(stall_timeout_s=0.1)
    engine.create_backend("length", lambda request: str(len(request.data)))
    engine.create_endpoint("length", backend="length", route="/length", methods=["POST"])
    host, port = engine.http_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"POST /length HTTP/1.1\r\nhost: x\r\n{framing}".encode())
        answer = b""
        while part := connection.recv(65536):  # until it is closed
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")

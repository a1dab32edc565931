"""The local engine's HTTP servers: protocols, TLS, several workers, and where they run."""

from __future__ import annotations

import os
import signal
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import trustme
from starlette.middleware import Middleware

from engine import Engine, errors
from engine.testing.instruments import eventually, is_running


def describe(request):
    return {"version": request.scope["http_version"], "scheme": request.url.scheme}


class ProcessHeader:
    """Tells which process an answer came from."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def tell(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-process", str(os.getpid()).encode())]}
            await send(message)

        await self.app(scope, receive, tell)


def make_engine(**options):
    engine = Engine(backend="local", http_options={"host": "127.0.0.1", "port": 0, **options})
    try:
        engine.create_backend("describe", describe)
        engine.create_endpoint("describe", backend="describe", route="/describe", methods=["GET", "POST"])
    except BaseException:
        engine.shutdown()
        raise
    return engine


@pytest.fixture(scope="module")
def plain():
    with make_engine(middlewares=[Middleware(ProcessHeader)]) as engine:
        engine.create_backend("process", lambda request: os.getpid())
        engine.create_endpoint("process", backend="process", route="/process")
        yield engine


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate for 127.0.0.1 in files, and a client's settings that trust it."""
    directory = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_pem.write_to_path(directory / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(directory / "cert.pem", append=True)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return {"certfile": str(directory / "cert.pem"), "keyfile": str(directory / "key.pem")}, context


def test_the_ingress_has_a_process_of_its_own(plain, client):
    pid = int(client.get(f"{plain.http_url}/describe").headers["x-process"])
    assert is_running(pid)
    assert pid not in (os.getpid(), client.get(f"{plain.http_url}/process").json())


def test_http_1(plain):
    with httpx.Client() as client:
        answers = [client.get(f"{plain.http_url}/describe") for _ in range(3)]
    assert {answer.http_version for answer in answers} == {"HTTP/1.1"}
    assert answers[0].json() == {"version": "1.1", "scheme": "http"}


def test_connections_are_kept(plain):
    with socket.create_connection(("127.0.0.1", httpx.URL(plain.http_url).port), timeout=20) as connection:
        for _ in range(3):
            connection.sendall(b"GET /describe HTTP/1.1\r\nHost: x\r\n\r\n")
            received = b""
            while not received.endswith(b"}"):
                chunk = connection.recv(4096)
                assert chunk, received
                received += chunk
            assert received.startswith(b"HTTP/1.1 200")


def test_http_2_by_prior_knowledge(plain):
    with httpx.Client(http1=False, http2=True) as client:
        for _ in range(3):
            answer = client.get(f"{plain.http_url}/describe")
            assert answer.http_version == "HTTP/2"
            assert answer.json() == {"version": "2", "scheme": "http"}
        body = b"x" * 300_000
        assert client.post(f"{plain.http_url}/describe", content=body).status_code == 200


def test_tls(certificates):
    files, context = certificates
    with make_engine(**files) as engine:
        assert engine.http_url.startswith("https://")
        with httpx.Client(verify=context) as client:
            assert client.get(f"{engine.http_url}/describe").json() == {"version": "1.1", "scheme": "https"}
        with httpx.Client(verify=context, http2=True) as client:
            answer = client.get(f"{engine.http_url}/describe")
            assert answer.http_version == "HTTP/2"
            assert answer.json() == {"version": "2", "scheme": "https"}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{engine.http_url}/describe")


def test_a_certificate_that_is_none(tmp_path):
    (tmp_path / "bad.pem").write_text("no certificate")
    path = str(tmp_path / "bad.pem")
    with pytest.raises(errors.InvalidArgument, match=r"bad\.pem"):
        make_engine(certfile=path, keyfile=path)


def ask_often(client, url, count=24):
    """Ask over many connections at once."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(client.get, [url] * count))


def ingress_processes(client, engine):
    return {answer.headers["x-process"] for answer in ask_often(client, f"{engine.http_url}/describe")}


def test_workers_share_the_port(client):
    with make_engine(workers=2, middlewares=[Middleware(ProcessHeader)]) as engine:
        eventually(lambda: len(ingress_processes(client, engine)) == 2)


def test_a_route_is_live_on_every_worker_at_once(client):
    with make_engine(workers=2) as engine:
        for number in range(5):
            route = f"/route-{number}"
            engine.create_endpoint(route, backend="describe", route=route)
            url = engine.http_url + route
            assert {answer.status_code for answer in ask_often(client, url)} == {200}
            engine.delete_endpoint(route)
            assert {answer.status_code for answer in ask_often(client, url)} == {404}


def test_an_ingress_that_dies_is_replaced(client):
    with make_engine(middlewares=[Middleware(ProcessHeader)]) as engine:
        (pid,) = ingress_processes(client, engine)
        os.kill(int(pid), signal.SIGKILL)

        def answered():
            try:
                return client.get(f"{engine.http_url}/describe").headers["x-process"]
            except httpx.TransportError:
                return None

        assert eventually(answered) != pid


@pytest.mark.parametrize("location", ["HeadOnly", "EveryNode"])
def test_locations_with_a_server(client, location):
    with make_engine(location=location) as engine:
        assert client.get(f"{engine.http_url}/describe").status_code == 200


@pytest.mark.parametrize("location", ["NoServer", None])
def test_locations_without_one(location):
    with make_engine(location=location) as engine:
        assert engine.http_url is None
        assert engine.get_handle("describe") is not None
        assert [name for name in engine.list_endpoints()] == ["describe"]


def test_host_names_and_ipv6(client):
    with make_engine(host="localhost") as engine:
        assert client.get(f"{engine.http_url}/describe").status_code == 200
    if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6"):
        with make_engine(host="::1") as engine:
            assert engine.http_url.startswith("http://[::1]:")
            assert client.get(f"{engine.http_url}/describe").status_code == 200


def test_settings_of_the_server_pass_through(client):
    with make_engine(include_server_header=True) as engine:
        assert "server" in client.get(f"{engine.http_url}/describe").headers


def test_shutdown_ends_idle_connections_and_finishes_busy_ones(client, gate):
    def held(request):
        gate.pass_through()
        return "finished"

    engine = make_engine()
    engine.create_backend("held", held)
    engine.create_endpoint("held", backend="held", route="/held")
    url = engine.http_url
    with httpx.Client(timeout=30) as idle, ThreadPoolExecutor(2) as pool:
        assert idle.get(f"{url}/describe").status_code == 200
        busy = pool.submit(client.get, f"{url}/held")
        gate.wait_for_arrivals(1)
        closing = pool.submit(engine.shutdown)
        gate.open()
        assert busy.result(30).text == "finished"
        closing.result(30)
        with pytest.raises(httpx.TransportError):
            idle.get(f"{url}/describe")


def test_a_backend_that_does_not_come_back_is_not_ready(plain, client, gate):
    class Mortal:
        def __init__(self):
            if gate.is_open():
                raise RuntimeError("it does not start again")

        def __call__(self, request):
            gate.open()
            os._exit(1)

    plain.create_backend("mortal", Mortal)
    plain.create_endpoint("mortal", backend="mortal", route="/mortal")
    readyz = f"{plain.http_url}/-/readyz"
    assert client.get(readyz).json()["ready"] is True
    assert client.get(f"{plain.http_url}/mortal").status_code == 502
    eventually(lambda: "no replica" in client.get(readyz).json()["backends"]["mortal"].get("reason", ""))
    assert client.get(readyz, params={"backend": "mortal"}).status_code == 503
    assert client.get(readyz, params={"backend": "describe"}).status_code == 200
    assert client.get(f"{plain.http_url}/-/healthz").status_code == 200
    plain.delete_endpoint("mortal")
    plain.delete_backend("mortal", force=True)


@pytest.mark.parametrize("backend", ["local", "inline"])
def test_a_port_that_another_engine_of_this_process_holds(plain, backend):
    port = httpx.URL(plain.http_url).port
    with Engine(backend=backend, http_options={"port": port}) as second:
        second.create_backend("describe", describe)
        with pytest.raises(errors.InvalidArgument, match=f"port {port} .another engine of this process serves there"):
            second.create_endpoint("describe", backend="describe", route="/describe")

"""Answers that come in parts."""

from __future__ import annotations

import asyncio
import random
import threading

import httpx
import pytest
from starlette.background import BackgroundTask
from starlette.responses import PlainTextResponse, StreamingResponse

from engine import errors
from engine.testing.instruments import PATIENCE_S, eventually


def sync_generator(request):
    yield "one "
    yield b"two "
    yield "three"


async def async_generator(request):
    for part in ("one ", b"two ", "three"):
        yield part


def sync_streaming_response(request):
    return StreamingResponse(sync_generator(request), status_code=202, media_type="text/x-stream")


async def async_streaming_response(request):
    return StreamingResponse(async_generator(request), status_code=202, media_type="text/x-stream")


@pytest.mark.parametrize("backend", [sync_generator, async_generator])
def test_generators_stream(serve, backend):
    response = serve(backend).http()
    assert (response.status_code, response.text) == (200, "one two three")
    assert response.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("backend", [sync_streaming_response, async_streaming_response])
def test_streaming_responses(serve, backend):
    response = serve(backend).http()
    assert (response.status_code, response.text) == (202, "one two three")
    assert response.headers["content-type"].startswith("text/x-stream")


@pytest.mark.parametrize("kind", ["sync", "async", "response"])
def test_a_stream_is_not_collected_first(serve, client, gate, kind):
    """The first part reaches the client while the backend holds the second one back."""

    def sync_stream(request):
        yield "first"
        gate.pass_through()
        yield "second"

    async def async_stream(request):
        yield "first"
        await gate.apass_through()
        yield "second"

    def streaming_response(request):
        return StreamingResponse(sync_stream(request))

    served = serve({"sync": sync_stream, "async": async_stream, "response": streaming_response}[kind])
    with client.stream("GET", served.url) as response:
        parts = response.iter_text()
        assert next(parts) == "first"
        gate.open()
        assert "".join(parts) == "second"


@pytest.mark.parametrize("kind", ["sync", "async", "response"])
def test_a_stream_ends_when_its_client_leaves(serve, client, journal, kind):
    """The backend's generator is closed, its place is free again, and nothing was produced for nobody."""

    def sync_stream(request):
        try:
            while True:
                yield b"x" * 65536
        finally:
            journal.add("closed")

    async def async_stream(request):
        try:
            while True:
                yield b"x" * 65536
        finally:
            journal.add("closed")

    async def streaming_response(request):
        return StreamingResponse(async_stream(request))

    backend = {"sync": sync_stream, "async": async_stream, "response": streaming_response}[kind]
    served = serve(backend, config={"max_concurrent_queries": 1})
    for number in range(2):
        with client.stream("GET", served.url) as response:
            assert len(next(response.iter_bytes())) > 0
        eventually(lambda number=number: journal.lines() == ["closed"] * (number + 1))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_ends_when_a_client_of_http_2_leaves(serve, journal, kind):
    """Its server waits for room in the client's window; the replica, however, must not."""

    def sync_stream(request):
        try:
            while True:
                yield b"x" * 50_000
        finally:
            journal.add("closed")

    async def async_stream(request):
        try:
            while True:
                yield b"x" * 50_000
        finally:
            journal.add("closed")

    served = serve({"sync": sync_stream, "async": async_stream}[kind], config={"max_concurrent_queries": 1})
    for number, wanted in enumerate((1, 3_000_000)):
        with httpx.Client(http1=False, http2=True) as client, client.stream("GET", served.url) as response:
            assert response.http_version == "HTTP/2"
            parts = response.iter_bytes()
            while wanted > 0:
                wanted -= len(next(parts))
        eventually(lambda number=number: journal.lines() == ["closed"] * (number + 1))


def test_a_slow_client_holds_the_stream_back(serve, client, journal):
    """What nobody reads is not produced: memory stays bounded by the credit and the sockets' buffers."""

    def backend(request):
        for _ in range(2000):
            journal.add("made")
            yield b"x" * 65536

    with client.stream("GET", serve(backend).url) as response:
        next(response.iter_bytes())
        with pytest.raises(AssertionError):
            eventually(lambda: len(journal.lines()) >= 1000, timeout_s=0.5)


def test_a_long_stream_arrives_whole_and_in_order(serve):
    def numbers(request):
        for number in range(2000):
            yield f"{number}\n"

    assert serve(numbers).http().text.split() == [str(number) for number in range(2000)]


def test_a_stream_that_breaks_off_is_not_taken_for_complete(serve):
    def backend(request):
        yield "first"
        raise ValueError("in the middle")

    served = serve(backend)
    with pytest.raises(httpx.RemoteProtocolError):
        served.http()
    with pytest.raises(httpx.RemoteProtocolError):
        served.http()


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_stream_that_fails_to_end_harms_nobody_else(serve, client, engine, kind):
    """A client leaves early, and the generator raises while it is closed."""

    def sync_stream():
        try:
            while True:
                yield b"x" * 10000
        finally:
            raise ValueError("cannot stop")

    class Sync:
        def __init__(self):
            self.number = random.random()

        def __call__(self, request):
            return sync_stream() if "stream" in request.query_params else str(self.number)

    class Async(Sync):
        async def __call__(self, request):
            return super().__call__(request)

    served = serve({"sync": Sync, "async": Async}[kind])
    before = served.http_text()
    with client.stream("GET", f"{served.url}?stream=1") as response:
        next(response.iter_bytes())
    assert served.http_text() == before, "the replica is another one"


@pytest.mark.parametrize("kind", ["stream", "async stream", "background task"])
def test_a_plain_backend_hears_while_it_streams(serve, client, gate, kind):
    """Or while it runs what is left to do after an answer: a full replica refuses at once."""

    def sync_stream():
        yield "first"
        gate.pass_through()

    async def async_stream():
        yield "first"
        await gate.apass_through()

    def backend(request):
        if "hold" not in request.query_params:
            return "ok"
        if kind == "background task":
            return PlainTextResponse("first", background=BackgroundTask(gate.pass_through))
        return sync_stream() if kind == "stream" else async_stream()

    def ask(call):
        try:
            answers.append(call())
        except errors.Overloaded:
            answers.append("refused")

    def ask_http():
        response = served.http()
        return "refused" if response.status_code == 503 else response.text

    served = serve(backend, config={"max_concurrent_queries": 1, "max_queued_requests": 0})
    answers = []
    with client.stream("GET", served.url, params={"hold": 1}) as response:
        parts = response.iter_text()
        assert next(parts) == "first"
        gate.wait_for_arrivals(1)
        # Two callers that know nothing of each other: at most one of them finds room.
        threads = [threading.Thread(target=ask, args=(call,)) for call in (served.call, ask_http)]
        for thread in threads:
            thread.start()
        eventually(lambda: "refused" in answers, timeout_s=PATIENCE_S / 2)  # before the gate gives up
        gate.open()
        assert list(parts) == []
        for thread in threads:
            thread.join()
    assert set(answers) <= {"ok", "refused"}


def test_an_async_stream_of_a_plain_backend_ends_when_its_client_leaves(serve, client, journal):
    """Also while it waits for something that never comes."""

    async def endless():
        try:
            yield "first"
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what ends it must not interrupt how it ends
            journal.add("closed")

    def backend(request):
        return endless() if "stream" in request.query_params else "ok"

    served = serve(backend)
    with client.stream("GET", served.url, params={"stream": 1}) as response:
        assert next(response.iter_text()) == "first"
    eventually(lambda: journal.lines() == ["closed"])
    assert served.http_text() == "ok"

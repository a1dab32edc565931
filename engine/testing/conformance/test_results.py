"""What a backend returns, as an HTTP client and as a handle's caller see it."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import uuid

import numpy
import pydantic
import pytest
from starlette.background import BackgroundTask
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)

from engine import errors
from engine.seam.scribe import scribe
from engine.testing.instruments import PATIENCE_S, eventually, open_files


@dataclasses.dataclass
class Point:
    x: int
    y: list[int]


class Model(pydantic.BaseModel):
    name: str
    when: datetime.date


WHEN = datetime.datetime(2024, 2, 29, 12, 30, 1, tzinfo=datetime.timezone.utc)
DAY = datetime.date(2024, 2, 29)
JSON = "application/json"

BODIES = {
    "str": (lambda: "text ÿ", "text/plain", "text ÿ".encode()),
    "bytes": (lambda: b"\x00\xff", "application/octet-stream", b"\x00\xff"),
    "none": (lambda: None, None, b""),
    "dict": (lambda: {"a": [1, 2], "b": "ÿ"}, JSON, '{"a":[1,2],"b":"ÿ"}'.encode()),
    "list": (lambda: [1, "a", None, True, 2.5], JSON, b'[1,"a",null,true,2.5]'),
    "tuple": (lambda: (1, 2), JSON, b"[1,2]"),
    "int": (lambda: 5, JSON, b"5"),
    "bool": (lambda: True, JSON, b"true"),
    "array": (lambda: numpy.array([[1, 2], [3, 4]]), JSON, b"[[1,2],[3,4]]"),
    "array-of-floats": (lambda: numpy.array([0.5, 1.0], dtype="float32"), JSON, b"[0.5,1.0]"),
    "numpy-scalar": (lambda: numpy.int64(7), JSON, b"7"),
    "numpy-inside": (lambda: {"a": numpy.float64(0.5), "b": [numpy.bool_(True)]}, JSON, b'{"a":0.5,"b":[true]}'),
    "dataclass": (lambda: Point(1, [2]), JSON, b'{"x":1,"y":[2]}'),
    "datetime": (lambda: WHEN, JSON, b'"2024-02-29T12:30:01+00:00"'),
    "date-inside": (lambda: {"day": DAY}, JSON, b'{"day":"2024-02-29"}'),
    "pydantic": (lambda: Model(name="x", when=DAY), JSON, b'{"name":"x","when":"2024-02-29"}'),
    "exception-inside": (lambda: {"errors": [ValueError("no luck")]}, JSON, b'{"errors":["no luck"]}'),
    "pydantic-inside": (lambda: [Model(name="x", when=DAY)], JSON, b'[{"name":"x","when":"2024-02-29"}]'),
    "uuid": (lambda: uuid.UUID(int=5), JSON, b'"00000000-0000-0000-0000-000000000005"'),
    "set": (lambda: {5}, JSON, b"[5]"),
    "text-response": (lambda: PlainTextResponse("plain"), "text/plain", b"plain"),
    "json-response": (lambda: JSONResponse({"a": 1}), JSON, b'{"a":1}'),
    "html-response": (lambda: HTMLResponse("<p>hi</p>"), "text/html", b"<p>hi</p>"),
}


def body_by_name(request):
    return BODIES[request.query_params["name"]][0]()


@pytest.mark.parametrize("name", BODIES)
def test_bodies(serve_once, name):
    _, media_type, body = BODIES[name]
    response = serve_once(body_by_name).http(params={"name": name})
    assert response.status_code == 200
    assert response.content == body
    assert response.headers.get("content-type", "").partition(";")[0] == (media_type or "")
    assert response.headers["content-length"] == str(len(body))


@pytest.mark.parametrize("name", ["str", "none", "tuple", "dataclass", "datetime", "pydantic", "numpy-scalar"])
def test_handles_get_the_python_object(serve_once, name):
    make = BODIES[name][0]
    result = serve_once(body_by_name).handle.call(name=name)
    assert type(result) is type(make())
    assert result == make()


def test_text_is_utf8(serve):
    assert serve(lambda request: "☃").http().headers["content-type"] == "text/plain; charset=utf-8"


def test_own_status_and_headers(serve):
    def backend(request):
        response = Response("made", status_code=201, headers={"X-Made": "yes"}, media_type="text/x-own")
        response.set_cookie("a", "1")
        response.set_cookie("b", "2")
        return response

    served = serve(backend)
    response = served.http("POST")
    assert (response.status_code, response.text) == (201, "made")
    assert response.headers["x-made"] == "yes"
    assert response.headers["content-type"].startswith("text/x-own")
    assert [cookie.partition("=")[0] for cookie in response.headers.get_list("set-cookie")] == ["a", "b"]
    by_handle = served.call()
    assert isinstance(by_handle, Response)
    assert (by_handle.status_code, by_handle.body, by_handle.headers["x-made"]) == (201, b"made", "yes")


def test_no_content(serve):
    response = serve(lambda request: Response(status_code=204)).http()
    assert (response.status_code, response.content) == (204, b"")


def test_redirect(serve):
    response = serve(lambda request: RedirectResponse("/elsewhere")).http()
    assert (response.status_code, response.headers["location"]) == (307, "/elsewhere")


def with_background(kind, task):
    def sync(request):
        if request.query_params["response"] == "plain":
            return PlainTextResponse("answered", background=task)
        return StreamingResponse(iter(["answ", "ered"]), background=task)

    async def asynchronous(request):
        return sync(request)

    return sync if kind == "sync" else asynchronous


@pytest.mark.parametrize("response", ["plain", "streaming"])
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_background_task_runs_after_the_answer(serve, journal, kind, response):
    served = serve(with_background(kind, BackgroundTask(journal.add, "ran")))
    assert served.http(params={"response": response}).text == "answered"
    eventually(lambda: journal.lines() == ["ran"])


def test_file_response(serve, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789" * 50_000)
    served = serve(lambda request: FileResponse(path, filename="own.txt"))
    response = served.http()
    assert response.content == path.read_bytes()
    assert "own.txt" in response.headers["content-disposition"]
    assert served.http(headers={"Range": "bytes=2-4"}).content == b"234"


def test_a_file_response_closes_its_file(serve, tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"0123456789" * 50_000)

    class Backend:
        def __call__(self, request):
            return FileResponse(path)

        def open_files(self):
            return [target for target in open_files().values() if target == str(path)]

    served = serve(Backend)
    assert served.http().content == path.read_bytes()
    eventually(lambda: served.call(method_name="open_files") == [])


def test_head_has_no_body(serve):
    served = serve(lambda request: "text", methods=["GET"])
    response = served.http("HEAD")
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/plain")


def test_answers_without_a_body_may_say_how_long_it_would_be(serve):
    def backend(request):
        status = int(request.query_params.get("status", 200))
        return Response(status_code=status, headers={"content-length": "1000"})

    served = serve(backend)
    response = served.http("HEAD")
    assert (response.status_code, response.headers["content-length"]) == (200, "1000")
    assert served.http(params={"status": 304}).status_code == 304
    assert served.http().status_code == 500


def test_a_result_that_is_no_json_fails_alone(serve):
    def backend(request):
        return {"key": object()} if request.query_params else "fine"

    served = serve(backend)
    response = served.http(params={"bad": "1"})
    assert response.status_code == 500
    assert "object" not in response.text
    assert served.http().text == "fine"


def test_decimal_does_not_lose_digits(serve):
    assert "0.10000000000000000001" in serve(lambda request: decimal.Decimal("0.10000000000000000001")).http().text


def test_a_callback_that_raises_harms_nobody_else(serve, engine, adapter, gate):
    """It runs in the thread that brings everybody's answers."""
    if not adapter.own_refs:
        pytest.skip("refs of this adapter are those of its platform")

    def backend(request):
        gate.pass_through()
        return "ok"

    handle = serve(backend, route=None).handle
    ref = handle.remote()
    ref.add_done_callback(lambda _: 1 / 0)
    gate.open()
    assert engine.get(ref, timeout=20) == "ok"
    assert engine.get([handle.remote() for _ in range(3)], timeout=20) == ["ok"] * 3


def test_a_result_that_can_neither_be_pickled_nor_shown(serve):
    class Odd:
        def __reduce__(self):
            raise TypeError("no")

        def __repr__(self):
            raise ValueError("no")

    class Backend:
        def __init__(self):
            self.calls = 0

        def __call__(self, request):
            self.calls += 1
            return Odd() if request.data else self.calls

    served = serve(Backend, route=None)
    with pytest.raises(errors.ResultNotSerializable, match="Odd, whose repr raised ValueError"):
        served.call(True)
    assert served.call() == 2, "the replica is the same"


def test_a_result_without_a_form_in_json_is_explained_in_the_log(serve, caplog):
    served = serve(lambda request: {"inner": [object()]})
    assert served.http().status_code == 500
    assert eventually(lambda: "has no form in JSON" in caplog.text) is True


def test_a_response_that_is_not_as_long_as_it_says_is_explained_in_the_log(serve, caplog):
    served = serve(lambda request: Response(b"hello", headers={"content-length": request.query_params["length"]}))
    for length in (2, 9):
        response = served.http(params={"length": length})
        assert (response.status_code, response.text) == (500, "Internal Server Error")
        why = f"content-length of the answer is {length}, but its body has 5 bytes"
        eventually(lambda why=why: why in caplog.text)
        failed = f"backend {served.tag!r} failed, request {response.headers['x-request-id']}"
        eventually(lambda failed=failed: failed in caplog.text)
    scribe().flush(PATIENCE_S)
    assert "middleware" not in caplog.text

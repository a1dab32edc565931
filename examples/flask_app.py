"""The engine inside a Flask application, called through a sync handle.

    python examples/flask_app.py                       tests itself and exits
    python examples/flask_app.py --serve --port 8000   serves with Flask's development server

Any WSGI server can run it just as well: gunicorn --chdir examples 'flask_app:create_app()'

A server that forks its workers must make the application in each of them (gunicorn does unless told to preload): an
engine belongs to the process that created it.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor

from flask import Flask, jsonify, request

from engine import Engine, errors


class PrimeFactors:
    """Pure Python that would hold the interpreter lock of the web server for as long as it computes."""

    def __call__(self, request):
        number, divisor, factors = request.data, 2, []
        while divisor * divisor <= number:
            while number % divisor == 0:
                factors.append(divisor)
                number //= divisor
            divisor += 1
        return {"factors": factors + [number] * (number > 1), "pid": os.getpid()}


def create_app():
    app = Flask(__name__)
    # Flask has no shutdown hook; the engine shuts down by itself when the interpreter exits, or when you tell it.
    engine = Engine(backend="local", http_options={"location": None})
    engine.create_backend("factors", PrimeFactors, config={"num_replicas": 2, "max_queued_requests": 100})
    engine.create_endpoint("factors", backend="factors")
    factors = engine.get_handle("factors")  # safe to share between Flask's threads
    app.extensions["engine"] = engine

    @app.get("/factors/<int:number>")
    def show_factors(number):
        return jsonify(factors.options(timeout_s=10).call(number))

    @app.get("/many")
    def show_many():
        # remote() does not wait, so the replicas work on all of them at once.
        numbers = [int(text) for text in request.args["numbers"].split(",")]
        answers = engine.get([factors.remote(number) for number in numbers])
        return jsonify({str(number): answer["factors"] for number, answer in zip(numbers, answers, strict=True)})

    @app.errorhandler(errors.RetryLater)
    def busy(error):
        # Overloaded, past its deadline, or its replica died: the caller may try again.
        return jsonify({"error": str(error)}), 503, {"Retry-After": "1"}

    return app


def check(app):
    """Ask it a few things with Flask's test client."""

    def ask(path):
        return app.test_client().get(path)

    answer = ask("/factors/1001")
    print(f"GET /factors/1001: {answer.status_code} {answer.json} (this is pid {os.getpid()})")
    assert answer.json["pid"] != os.getpid()
    print(f"GET /many?numbers=12,97,360: {ask('/many?numbers=12,97,360').json}")
    with ThreadPoolExecutor(8) as threads:  # eight requests at a time, as a threaded server would make them
        codes = [answer.status_code for answer in threads.map(ask, [f"/factors/{n}" for n in range(1000, 1040)])]
    print(f"40 requests from 8 threads: {codes.count(200)} answered with 200")


if __name__ == "__main__":  # so that a server can import this file without running it; the engine does not need it
    options = argparse.ArgumentParser()
    options.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options.add_argument("--port", type=int, default=0, help="0 picks a free one, and Flask says which")
    chosen = options.parse_args()
    app = create_app()
    if chosen.serve:
        app.run(port=chosen.port)
    else:
        check(app)
        app.extensions["engine"].shutdown()

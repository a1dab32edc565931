"""Testing a backend with pytest: `pytest examples/test_my_backend.py`.

Three levels, each slower and closer to production than the one before: the class itself, the inline adapter (everything
the engine does except processes), the local adapter (real processes). HTTP is tested the same way on both adapters.
"""

import json
import os
import urllib.error
import urllib.request

import pytest

from engine import Engine, ServeRequest, errors


class Cart:
    """The backend under test. It would usually be imported from your package."""

    def __init__(self, prices):
        self.prices = prices

    def __call__(self, request):
        item = request.query_params["item"]
        return {"item": item, "price": self.prices[item], "pid": os.getpid()}


PRICES = {"tea": 3, "cake": 5}


def test_the_class_alone():
    """No engine: a ServeRequest can be made by hand."""
    assert Cart(PRICES)(ServeRequest(None, kwargs={"item": "tea"}))["price"] == 3


@pytest.fixture(scope="module", params=["inline", "local"])
def engine(request):
    """One engine for the tests of this file; leaving the `with` ends every replica, also after a failure."""
    with Engine(backend=request.param, http_options={"port": 0}) as engine:
        engine.create_backend("cart", Cart, PRICES)
        engine.create_endpoint("cart", backend="cart", route="/cart")
        yield engine


def test_by_handle(engine):
    assert engine.get_handle("cart").call(item="cake")["price"] == 5


def test_a_users_error_arrives_as_itself(engine):
    with pytest.raises(KeyError, match="anchovy"):
        engine.get_handle("cart").call(item="anchovy")


def test_over_http(engine):
    with urllib.request.urlopen(f"{engine.http_url}/cart?item=tea") as response:
        assert json.load(response)["price"] == 3


def test_errors_over_http(engine):
    with pytest.raises(urllib.error.HTTPError) as failure:
        urllib.request.urlopen(f"{engine.http_url}/cart?item=anchovy")
    with failure.value as response:
        assert response.code == 500
        assert b"anchovy" not in response.read()  # what went wrong inside is nobody's business outside


def test_a_wrong_call_names_its_mistake(engine):
    with pytest.raises(errors.EndpointNotFound, match="basket"):
        engine.get_handle("basket")


def test_local_replicas_are_other_processes():
    """What only processes can show belongs into a test of its own."""
    with Engine(backend="local", http_options={"location": None}) as engine:
        engine.create_backend("cart", Cart, PRICES)
        engine.create_endpoint("cart", backend="cart")
        assert engine.get_handle("cart").call(item="tea")["pid"] != os.getpid()

"""A class with state and several methods, called by name from Python and over HTTP.

State lives in a replica, so this backend has exactly one: two would count two balances.
"""

import json
import urllib.error
import urllib.request

from engine import Engine, errors


class InsufficientFunds(Exception):
    """Yours: it reaches the caller as this very type."""


class Account:
    def __init__(self, owner, balance=0):
        self.owner = owner
        self.balance = balance

    def __call__(self, request):
        # What is called when nobody names a method.
        return {"owner": self.owner, "balance": self.balance}

    def withdraw(self, amount):
        # For Python callers: plain arguments, as in any method call.
        if amount > self.balance:
            raise InsufficientFunds(f"{self.owner} has {self.balance}, not {amount}")
        self.balance -= amount
        return self.balance

    async def deposit(self, request):
        # The first parameter is called `request`, so Python callers pass a request too and HTTP callers can use it.
        amount = (await request.json())["amount"]
        self.balance += amount  # calls take turns at each `await` and nowhere else, so this needs no lock
        return {"balance": self.balance}

    def _audit(self):
        # Not public: a leading underscore keeps every caller out.
        return "secret"


with Engine(backend="local", http_options={"port": 0}) as engine:
    engine.create_backend("account", Account, "Ada", balance=100)
    engine.create_endpoint("account", backend="account", route="/account", methods=["GET", "POST"])
    handle = engine.get_handle("account")

    print(f"from Python:  {handle.call()}")
    withdraw = handle.options(method_name="withdraw")  # a new handle; the first one stays as it is
    print(f"withdraw 30:  {withdraw.call(30)} left")
    print(f"deposit 5:    {handle.options(method_name='deposit').call({'amount': 5})}")

    try:
        withdraw.call(500)
    except InsufficientFunds as error:
        print(f"withdraw 500: {type(error).__name__}: {error}")

    try:
        handle.options(method_name="_audit").call()
    except errors.MethodNotFound as error:
        print(f"_audit:       {type(error).__name__}: {error}")

    def post(method, body):
        """Over HTTP a header names the method."""
        headers = {"X-SERVE-CALL-METHOD": method, "Content-Type": "application/json"}
        return urllib.request.Request(f"{engine.http_url}/account", json.dumps(body).encode(), headers)

    with urllib.request.urlopen(post("deposit", {"amount": 25})) as response:
        print(f"over HTTP:    {json.load(response)}")
    try:
        urllib.request.urlopen(post("_audit", {}))
    except urllib.error.HTTPError as refusal:
        print(f"_audit:       HTTP status {refusal.code}")
        refusal.close()

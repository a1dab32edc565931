"""Many callers, one numpy operation: the engine gathers calls that are under way at the same time."""

import numpy as np

from engine import Engine, accept_batch


class LinearModel:
    def __init__(self, weights):
        self.weights = weights

    def one(self, features):
        # For comparison: a call of its own for every row.
        return float(features @ self.weights)

    @accept_batch
    def __call__(self, requests):
        # Never more than max_batch_size requests, and never fewer than one.
        rows = np.stack([request.data for request in requests])
        scores = rows @ self.weights
        # As many results as requests, in the same order; each goes to its own caller.
        return [{"score": float(score), "batch": len(requests)} for score in scores]


generator = np.random.default_rng(seed=7)
rows = generator.normal(size=(400, 64))
weights = generator.normal(size=64)

with Engine(backend="local", http_options={"location": None}) as engine:  # no HTTP here
    engine.create_backend(
        "linear",
        LinearModel,
        weights,
        # The first call of a batch waits 10 ms for others; a full batch goes at once.
        config={"max_batch_size": 50, "batch_wait_timeout": 0.01},
    )
    engine.create_endpoint("score", backend="linear")
    handle = engine.get_handle("score")

    # Each remote() is a call of its own, as if 400 users had made it; batching is the backend's private matter.
    answers = engine.get([handle.remote(row) for row in rows])
    scores = np.array([answer["score"] for answer in answers])
    sizes = [answer["batch"] for answer in answers]
    # Every member of a batch of n reports n, so it counts for 1/n of a batch.
    print(f"{len(answers)} calls were computed in {sum(1 / size for size in sizes):.0f} batches of up to {max(sizes)}")

    singles = engine.get([handle.options(method_name="one").remote(row) for row in rows[:5]])
    assert np.allclose(scores, rows @ weights)
    assert np.allclose(scores[:5], singles)
    print(f"every caller got its own score, the first five are {np.round(scores[:5], 3).tolist()}")

    # A caller who is alone waits the 10 ms and is a batch of one. The wait can be changed while it serves.
    engine.update_backend_config("linear", {"batch_wait_timeout": 0.0})
    print(f"a single call is a batch of {handle.call(rows[0])['batch']}")

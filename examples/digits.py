"""A scikit-learn classifier of handwritten digits: images in, numbers out, computed in batches.

The images are real handwriting and come with scikit-learn. HTTP clients send them as files (PGM, the plainest image
format there is), Python callers as numpy arrays.

    python examples/digits.py
    python examples/digits.py --serve --port 8000
"""

import argparse
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC
from starlette.responses import PlainTextResponse

from engine import Engine, ServeRequest, accept_batch

PGM_HEADER = b"P5 8 8 16\n"  # grey, 8 pixels wide and high, brightness 0 to 16, then one byte a pixel


class DigitReader:
    def __init__(self, model):
        self.model = model  # trained below, once; every replica gets a copy

    @accept_batch  # called with a list of requests; answers with as many results in the same order
    async def __call__(self, requests):
        images = [await self.pixels_of(request) for request in requests]
        good = [image for image in images if image is not None]
        # One call of the model for the whole batch: that is where the time goes.
        labels = iter(self.model.predict(np.stack(good))) if good else iter(())
        refusal = PlainTextResponse("send an 8x8 PGM image (P5, maximum 16)\n", status_code=400)
        # A bad image is answered on its own: an exception here would fail its neighbours too.
        return [refusal if image is None else int(next(labels)) for image in images]

    @staticmethod
    async def pixels_of(request):
        if isinstance(request, ServeRequest):  # through a handle: `data` is the very object the caller passed
            return request.data.ravel()
        body = await request.body()  # over HTTP: bytes
        if body[:-64] != PGM_HEADER:
            return None
        return np.frombuffer(body[-64:], dtype=np.uint8)


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--serve", action="store_true", help="keep serving until Ctrl-C")
    options.add_argument("--port", type=int, default=0, help="0 picks a free one")
    chosen = options.parse_args()

    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=300, random_state=0
    )
    model = SVC(gamma=0.001).fit(train_images.reshape(-1, 64), train_labels)
    print(f"trained on {len(train_images)} images, {len(test_images)} kept for the test")

    with Engine(backend="local", http_options={"port": chosen.port}) as engine:
        engine.create_backend(
            "digit_reader",
            DigitReader,
            model,
            config={"num_replicas": 2, "max_batch_size": 32, "batch_wait_timeout": 0.005},
            # One thread of linear algebra in each replica: two replicas with as many threads as there are processors
            # would only get in each other's way.
            ray_actor_options={"num_cpus": 1},
        )
        engine.create_endpoint("digits", backend="digit_reader", route="/digits", methods=["POST"])

        handle = engine.get_handle("digits")
        answers = np.array(engine.get([handle.remote(image) for image in test_images]))
        by_handle = np.mean(answers == test_labels)
        print(f"by handle: {len(answers)} images, accuracy {by_handle:.3f}")

        def post(image):
            body = PGM_HEADER + image.astype(np.uint8).tobytes()
            with urllib.request.urlopen(f"{engine.http_url}/digits", data=body) as response:
                return int(response.read())

        # Batches form only out of calls that are under way at the same time, so several threads ask.
        with ThreadPoolExecutor(8) as threads:
            answers = np.array(list(threads.map(post, test_images[:100])))
        by_http = np.mean(answers == test_labels[:100])
        print(f"over HTTP: {len(answers)} images, accuracy {by_http:.3f}")
        assert by_handle > 0.9 and by_http > 0.9

        if chosen.serve:
            with open("digit.pgm", "wb") as file:
                file.write(PGM_HEADER + test_images[0].astype(np.uint8).tobytes())
            print(f"\nserving; try: curl --data-binary @digit.pgm {engine.http_url}/digits", flush=True)
            try:
                threading.Event().wait()
            except KeyboardInterrupt:
                print()


main()

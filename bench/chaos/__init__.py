"""What the engine promises under faults, put to the test: replicas killed and stopped, floods, new versions, leaks.

`python -m bench.chaos` runs all of it and prints a table; `python -m bench.chaos kills --seconds 20` runs one scenario
for so long. Everything stays on loopback, and is bounded in count and time. With `--backend ray` the scenarios in which
Ray has a part run on a cluster of their own.
"""

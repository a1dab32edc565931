"""The suite that every adapter must pass: the whole public API of the engine, run against it.

``python -m engine.testing.conformance --adapter package:factory`` runs it, where the factory is any callable without
arguments that returns an adapter, such as the adapter's class. Other arguments are pytest's. It is the same as::

    python -m pytest -p engine.testing.conformance.plugin --pyargs engine.testing.conformance --adapter package:factory

It needs ``pip install "engineroom[conformance]"`` and Linux, because it looks into ``/proc`` for what is left behind.
"""

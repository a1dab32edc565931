"""What tests of applications and of adapters need: instruments, fakes, and the suite that every adapter must pass.

`engine.testing.instruments` waits for conditions, holds calls back and looks at what a process leaves behind;
`engine.testing.fakes` stands in for either side of the seams; `engine.testing.conformance` runs the whole public API
against an adapter. Only the suite imports more than the engine itself needs: ``pip install "engineroom[test]"``.
"""

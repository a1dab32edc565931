"""What crosses the two seams of the core, to adapters and to HTTP servers: protocols and immutable messages."""

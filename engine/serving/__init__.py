"""A replica: user code, and the door through which calls enter it."""

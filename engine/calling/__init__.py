"""One process's side of a call: handles and refs, the router that decides, and the caller that sends."""

"""The ingress as an ASGI application, and results as HTTP. No server: that is a plug-in."""

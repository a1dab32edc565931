"""Calls: channels to an engine's parties from any process of the cluster, and calls as object refs."""

"""This process's link to Ray: its connection, and what engines keep with the cluster."""

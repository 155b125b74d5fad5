"""Serving: export a checkpoint, check it, launch a server on it, talk to the server."""

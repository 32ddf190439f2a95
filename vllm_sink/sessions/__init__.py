"""Conversations kept for clients: a session is a row in a store, a turn an ordinary request."""

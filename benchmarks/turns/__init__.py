"""Turns of conversations: what is measured of sessions, and of clients that do without them."""

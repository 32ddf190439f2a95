"""Attention over sinks and a window: one interface, a reference, and a kernel for each device."""

"""Programs that put the parts together: what `make demo` starts."""

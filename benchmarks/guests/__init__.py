"""Scripts for other virtual environments: they import nothing of this project."""

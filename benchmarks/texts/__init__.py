"""What is read, how likely a model finds it, and what the paper found."""

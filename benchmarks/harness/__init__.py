"""What the questions are answered with: engines, servers, clients, and what they leave behind."""

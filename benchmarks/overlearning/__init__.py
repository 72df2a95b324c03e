"""What models know that their task does not need, and what it costs to forget it."""

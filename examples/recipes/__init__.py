"""Short complete programs that show gradsub inside other libraries' training loops."""

"""What a step costs the host: operations and python's time, at sizes where arithmetic is nothing."""

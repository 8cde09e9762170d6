"""What is measured of the null space."""

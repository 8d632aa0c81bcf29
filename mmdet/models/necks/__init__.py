"""What lies between backbone and heads."""

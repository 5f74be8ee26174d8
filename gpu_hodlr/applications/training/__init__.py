"""Training by Gauss-Newton steps."""

"""Networks of torch: their losses, and the curvature matrices of what they compute."""

"""What is accumulated of the curvature, one file a structure."""

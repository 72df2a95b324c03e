"""What every room uses and no user imports: files, progress bars, random states, checks."""

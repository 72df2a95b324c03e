"""Time, memory and error of the curvature estimators beside other libraries' (`python -m
benchmarks.bench`)."""

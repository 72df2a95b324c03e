"""Forget samples: Newton correction, noise, BatchNorm statistics; in one call or by requests."""

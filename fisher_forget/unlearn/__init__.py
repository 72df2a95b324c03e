"""Forget samples: Newton correction, noise and BatchNorm statistics, in one call or request by
request."""

"""Exact unlearning by sharding: SISA (Bourtoule et al. 2021, arXiv:1912.03817)."""

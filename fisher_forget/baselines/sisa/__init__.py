"""Exact unlearning by sharding: SISA (Bourtoule et al. 2021, arXiv:1912.03817)."""

from fisher_forget.baselines.sisa.ensemble import SISA

__all__ = ["SISA"]

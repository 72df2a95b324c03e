"""Data: who is retained and forgotten (`split`), what a batch is (`batches`), samples in memory."""

"""Data: who is retained and forgotten (`split`), what a batch is (`batches`), the recipes' data
(`datasets`)."""

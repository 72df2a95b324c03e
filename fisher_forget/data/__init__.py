"""Data: who is retained and forgotten (`split`), what a batch is (`batches`), and the recipes' data sets (`datasets`)."""

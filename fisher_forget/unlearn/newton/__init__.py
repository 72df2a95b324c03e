"""The Newton correction: when to follow the flow of the retained objective, and how far."""

"""The Newton correction: when to follow the flow of the retained objective, how far, and within
which bounds."""

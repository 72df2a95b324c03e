"""Tables, plots and one self-contained HTML page from the numbers of a run."""

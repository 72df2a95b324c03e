"""Published unlearning methods under one protocol, one file each, to compare with."""

"""One scheme a file: how a structure of its kind is made of an operator."""

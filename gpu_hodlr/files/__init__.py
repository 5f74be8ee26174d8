"""Archives of named arrays, and structures in them."""

"""Export formats, a module each, which makes its artifact from the one before it."""

"""The jobs of the command line, a module each."""

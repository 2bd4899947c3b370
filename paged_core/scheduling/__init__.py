"""This room decides which tokens are computed next and where they live. It knows integers and the standard library
only."""

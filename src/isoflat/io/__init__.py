"""Models, weights and data from files and names: read without ever running what a file says, and written whole or not at all."""

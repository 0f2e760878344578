"""What is on disk: the two formats of weights, and folders that are whole or not there at all."""

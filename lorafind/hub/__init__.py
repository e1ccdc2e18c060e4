"""Bases by name: in the folder of the user, and on the Hugging Face Hub."""

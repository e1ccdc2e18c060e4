"""The map: every LoRA of an architecture as a point, as one interactive page or as a picture."""

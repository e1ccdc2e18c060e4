"""Which LoRAs of a collection a file was merged or resized from."""

"""From paths to checked bytes and tensors; knows nothing of LoRAs."""

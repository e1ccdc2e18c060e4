"""Training LoRAs of the SD1.5 U-Net, with the settings of the paper as defaults."""

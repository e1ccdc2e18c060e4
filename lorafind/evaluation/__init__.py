"""What features of LoRAs are worth on labelled folders: the protocol of the paper."""

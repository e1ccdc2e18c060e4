"""Features of many LoRAs side by side, as matrices that are never whole in memory."""

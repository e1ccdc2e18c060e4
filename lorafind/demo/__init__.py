"""The collection that ``lorafind demo`` shows: real LoRAs from the package, and copies of them."""

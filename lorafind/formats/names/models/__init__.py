"""Tables of the true names of transformer models, one TOML file per architecture."""

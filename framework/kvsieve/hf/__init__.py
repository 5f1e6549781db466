"""The door into transformers: models, the attention interface, `generate()`, tensor parallel."""

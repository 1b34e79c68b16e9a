"""A small gpt-oss that was really trained, and the packs that it was trained and is evaluated on."""

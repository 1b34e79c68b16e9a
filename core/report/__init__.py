"""What people look at: maps, tables, and later Markdown and HTML."""

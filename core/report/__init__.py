"""What people look at: maps and progress in a terminal, and pages of HTML."""

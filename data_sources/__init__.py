"""Images that are drawn here or read from files."""
